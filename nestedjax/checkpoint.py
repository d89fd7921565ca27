"""Checkpoints that are verified leaf by leaf when they are read (the only Orbax).

Orbax saves asynchronously and survives a kill at any moment. But it loads a file with a flipped
bit without an error, converts a wrong dtype silently, and tries no earlier step when a file is
truncated. So each checkpoint carries a fingerprint of every leaf. `restore` compares names, shapes
and dtypes before it reads, and fingerprints afterwards; it warns of damage and returns the newest
whole step.
"""

import hashlib
import json
import os
import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

PyTree = Any


class CheckpointError(ValueError):
    """No checkpoint can be used, or one could not be written; the message names the fix."""


class CheckpointWarning(UserWarning):
    """A checkpoint was damaged and an earlier one is used."""


class Restored(NamedTuple):
    """What a checkpoint gave back.

    Attributes:
      step: of the checkpoint.
      state: the tree, placed as asked for.
      meta: what was given to `save`.
    """

    step: int
    state: PyTree
    meta: dict[str, Any]


class _Damaged(Exception):
    """This step cannot be trusted; the message says why."""


def fingerprints(state: PyTree) -> dict[str, str]:
    """Fingerprint every leaf: equal on any mesh for equal trees, different after one flipped bit.

    Over the words w_i of a leaf (its elements as unsigned integers, 64-bit ones as two words)
    they are sum_i w_i and sum_i (i + 1) w_i, modulo 2^32. Both sums are exact and do not depend on
    the order of summation, hence not on how a leaf is sharded.

    Args:
      state: a tree of arrays of any dtype, random keys among them.

    Returns:
      Path of each leaf -> 16 hexadecimal digits.

    Example:
      >>> import jax.numpy as jnp
      >>> fingerprints({"w": jnp.array([1, 2], jnp.int32)})
      {'w': '0000000300000005'}
    """
    named = _flatten(state)
    sums = jax.device_get(_sums(list(named.values()))) if named else []
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in zip(named, sums, strict=True)}


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
      folder: where they lie; made if missing. Any path of epath, `gs://` included.
      keep: number of newest steps kept.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> state = {"w": jnp.arange(3.0)}
      >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
      ...     checkpoints.save(10, state, meta={"note": "first"})
      ...     checkpoints.wait()
      ...     restored = checkpoints.restore(state)
      >>> restored.step, restored.meta
      (10, {'note': 'first'})
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 3):
        path = os.fspath(folder)
        self.folder = epath.Path(path if "://" in path else os.path.abspath(path))
        if keep < 2:
            raise ValueError(f"keep={keep} must be at least 2: damage needs a step to go back to")
        self._keep = keep
        self._damaged: set[int] = set()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, enable_async_checkpointing=True
        )
        names = ("state", "meta")
        return ocp.CheckpointManager(self.folder, options=options, item_names=names)

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, *, meta: dict[str, Any]) -> None:
        """Save in the background; returns once `state` may be donated or changed.

        Args:
          step: its number. Checkpoints that `restore` found damaged are moved aside first.
          state: a tree of JAX arrays.
          meta: JSON object kept beside it.

        Raises:
          CheckpointError: this save or the one before it could not be written.
        """
        self.wait()
        self._set_aside()
        named = _flatten(state)
        record = {
            "meta": meta,
            "leaves": {name: _describe(leaf) for name, leaf in named.items()},
            "fingerprints": fingerprints(state),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(named),
            meta=ocp.args.JsonSave({"record": record, "digest": _digest(record)}),
        )
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Wait until what was saved is on disk.

        Raises:
          CheckpointError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            # The manager would go on listing a step that is not there.
            raise self._failed(None, error) from error

    def restore(self, like: PyTree, *, part: str | None = None) -> Restored | None:
        """Read the newest checkpoint that is whole, bit for bit as it was saved.

        Args:
          like: arrays or `jax.ShapeDtypeStruct`s of the same structure; where they have a sharding
            the leaf is placed so, whatever mesh it was saved from.
          part: if given, `like` is only what was saved under this name; the rest is neither read
            nor checked.

        Returns:
          The checkpoint, or None if the folder holds none.

        Warns:
          CheckpointWarning: for each newer step that is damaged, with its first bad leaf.

        Raises:
          CheckpointError: checkpoints exist but all are damaged, or they belong to another model
            or optimizer; the message names the leaf.
        """
        self.wait()
        steps = self.steps()
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            try:
                state, meta = self._read(step, like, part)
            except _Damaged as damage:
                damaged[step] = str(damage)
                continue
            for bad, why in damaged.items():
                message = f"checkpoint of step {bad} is damaged ({why}); using step {step} instead"
                warnings.warn(message, CheckpointWarning, stacklevel=2)
            self._damaged = set(damaged)
            return Restored(step, state, meta)
        if damaged:
            step, why = next(iter(damaged.items()))
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole (step {step}: {why}); "
                "restore the folder from a copy, or start in a new run folder"
            )
        return None

    def reached_preemption(self, count: int) -> bool:
        """Whether all processes should stop here, as `jax.distributed` has agreed.

        Args:
          count: the number of this question: one more each time, the same in every process.
        """
        return jax.distributed.is_initialized() and self._manager.reached_preemption(count)

    def close(self) -> None:
        """Wait and close."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _read(self, step: int, like: PyTree, part: str | None) -> tuple[PyTree, dict[str, Any]]:
        record = self._read_record(step)
        prefix = "" if part is None else f"{part}."
        wanted = {prefix + name: leaf for name, leaf in _flatten(like).items()}
        saved = {n: leaf for n, leaf in record["leaves"].items() if n.startswith(prefix)}
        _require_same_leaves(saved, wanted, f"the checkpoint of step {step}")
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in wanted.items()
        }
        try:
            if part is None:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
                state = self._manager.restore(step, args=args)["state"]
            else:
                state = _read_some(self.folder / str(step) / "state", abstract)
        except Exception as error:
            raise _Damaged(_one_line(error)) from error
        found = fingerprints(state)
        bad = [name for name in found if found[name] != record["fingerprints"][name]]
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise _Damaged(f"the values of leaf {bad[0]}{more} are not those saved")
        leaves = [state[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), record["meta"]

    def _read_record(self, step: int) -> dict[str, Any]:
        try:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            found = self._manager.restore(step, args=args)["meta"]
            record, digest = found["record"], found["digest"]
        except Exception as error:
            raise _Damaged(f"its meta data cannot be read: {_one_line(error)}") from error
        if digest != _digest(record):
            raise _Damaged("its meta data is not that saved")
        return record

    def _set_aside(self) -> None:
        """Move damaged steps out of the way of new ones; nothing is deleted."""
        if not self._damaged:
            return
        self._manager.close()
        if jax.process_index() == 0:
            aside = self.folder.parent / f"{self.folder.name}-damaged"
            aside.mkdir(parents=True, exist_ok=True)
            for step in self._damaged:
                source = self.folder / str(step)
                if source.exists():
                    source.rename(aside / f"{step}-{time.time_ns()}")
        if jax.process_count() > 1:
            ocp.multihost.sync_global_processes("nestedjax:set_aside")
        self._damaged = set()
        self._manager = self._open()

    def _failed(self, step: int | None, error: Exception) -> CheckpointError:
        self._manager = self._open()
        what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        return CheckpointError(
            f"{what} could not be written to {self.folder}: {_one_line(error)}; "
            "make room or fix the permissions, then start the same command again"
        )


def _read_some(path: epath.Path, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Some of the leaves of a saved state; the manager reads all or none."""
    how = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(abstract, restore_args=how, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path, args=args)


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(leaf) for leaf in leaves]


def _sum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    bits = jax.dtypes.itemsize_bits(x.dtype)
    if x.dtype == jnp.bool_ or bits < 8:
        words = x.astype(jnp.uint32)
    else:
        # 64-bit elements become two words in a last axis.
        unsigned = {8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32)
        words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position = jnp.ones((), jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        # Modulo 2^32, as the sums are. No reshape: it would move data between devices.
        step = jnp.asarray(stride % 2**32, jnp.uint32)
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position + place * step
        stride *= words.shape[axis]
    return jnp.stack([words.sum(dtype=jnp.uint32), (words * position).sum(dtype=jnp.uint32)])


def _flatten(state: PyTree) -> dict[str, Any]:
    # A flat dict of paths is all Orbax sees: any pytree can be saved, and errors can name a leaf.
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"leaf {name} is a {type(leaf).__name__}; checkpoints hold JAX arrays: "
                "wrap it in jnp.asarray"
            )
        if name in named:
            raise CheckpointError(f"two leaves are called {name}; rename one")
        named[name] = leaf
    return named


def _describe(leaf: jax.Array | jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _require_same_leaves(saved: dict[str, str], wanted: dict[str, Any], what: str) -> None:
    fix = "use the configuration of this run, or start in a new run folder"
    for name, leaf in wanted.items():
        if name not in saved:
            raise CheckpointError(f"{what} has no leaf {name}; {fix}")
        if saved[name] != _describe(leaf):
            raise CheckpointError(
                f"leaf {name} is {saved[name]} in {what} and {_describe(leaf)} here; {fix}"
            )
    for name in saved:
        if name not in wanted:
            raise CheckpointError(f"{what} has a leaf {name} that is not wanted here; {fix}")


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
