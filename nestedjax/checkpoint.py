"""Checkpoints that are verified leaf by leaf when they are read (the only Orbax).

Orbax saves asynchronously and survives a kill at any moment. But it loads a file with a flipped
bit without an error, converts a wrong dtype silently, and tries no earlier step when a file is
truncated. So each checkpoint carries a fingerprint of every leaf. `restore` compares names, shapes
and dtypes before it reads, and fingerprints afterwards; it warns of damage and returns the newest
whole step.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from nestedjax import checkpoint_leaves as leaves
from nestedjax.checkpoint_leaves import CheckpointError
from nestedjax.errors import RunWarning, one_line
from nestedjax.fingerprints import fingerprints

PyTree = Any


def _of_orbax(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    paths = [
        frame.f_code.co_filename
        for frame, _ in traceback.walk_tb(getattr(error, "__traceback__", None))
    ]
    return any("orbax" in text for text in (record.pathname, str(record.msg), *paths))


# Orbax logs what it raises with its traceback, and what a writer has just removed; asyncio logs the
# writes that Orbax no longer awaits. We raise all that in one line.
logging.getLogger("absl").addFilter(
    lambda r: not _of_orbax(r) or not (r.levelno > 30 or "not exist" in str(r.msg))
)
logging.getLogger("asyncio").addFilter(lambda r: not _of_orbax(r))


class SaveError(CheckpointError):
    """A checkpoint could not be written; those before it are whole."""


class CheckpointWarning(RunWarning):
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


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
      folder: where they lie; made if missing. Any path of epath, `gs://` included.
      keep: number of newest steps kept; an older one goes once its successor is complete.
      read_only: for those who only `restore`: nothing is made or removed, and steps that another
        process adds or removes meanwhile are followed.

    Raises:
      CheckpointError: the folder cannot be opened.

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

    def __init__(
        self, folder: str | os.PathLike, *, keep: int = 3, read_only: bool = False
    ) -> None:
        path = os.fspath(folder)
        self.folder = epath.Path(path if "://" in path else os.path.abspath(path))
        if keep < 2:
            raise ValueError(f"keep={keep} must be at least 2: damage needs a step to go back to")
        self._keep, self._read_only = keep, read_only
        self._damaged: set[int] = set()
        self._saving: int | None = None
        try:
            self._manager = self._open()
        except OSError as error:
            raise CheckpointError(
                f"cannot open {self.folder} ({_reason(error)}); make it a folder of yours, or take"
                " another run folder"
            ) from error

    def _open(self) -> ocp.CheckpointManager:
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(20, "it is a file")
        if self._read_only:  # Orbax's own read_only warns of itself
            options = ocp.CheckpointManagerOptions(create=False)
        else:
            self._clean()
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, create=True, enable_async_checkpointing=True
            )
        names = ("state", "meta")
        return ocp.CheckpointManager(self.folder, options=options, item_names=names)

    def _clean(self) -> None:
        """Remove what a kill or a full disk left of a save.

        Now, not in the background as the manager's own option, which only the next save awaits.
        After a failed save, writers that Orbax no longer awaits may still add to what is removed
        here: `steps` never lists it, and the next opening removes it.
        """
        clean = ocp.path.step.temporary_paths.cleanup_temporary_paths
        with ThreadPoolExecutor(1) as thread:  # a notebook has an event loop of its own
            for attempt in range(5):
                try:
                    return thread.submit(lambda: asyncio.run(clean(self.folder))).result()
                except OSError:  # such a writer has added to a folder that was just emptied
                    if attempt == 4:
                        raise
                    time.sleep(0.1)

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, *, meta: dict[str, Any]) -> None:
        """Save in the background; returns once `state` may be donated or changed.

        Args:
          step: its number. Checkpoints that `restore` found damaged are moved aside first.
          state: a tree of JAX arrays, also of empty ones.
          meta: JSON object kept beside it.

        Raises:
          SaveError: this save or the one before it could not be written.
          CheckpointError: the tree or `meta` cannot be saved; nothing was written.
        """
        named = leaves.flatten(state)
        _require_json(meta)
        self.wait()
        record = {
            "meta": meta,
            "leaves": {name: leaves.describe(leaf) for name, leaf in named.items()},
            "fingerprints": fingerprints(state),
        }
        items = {"meta": ocp.args.JsonSave({"record": record, "digest": _digest(record)})}
        if stored := leaves.stored(named):
            items["state"] = ocp.args.StandardSave(stored)
        self._saving = step
        try:
            self._require_folder()
            self._set_aside()
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Wait until what was saved is on disk.

        Raises:
          SaveError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            # The manager would go on listing a step that is not there.
            raise self._failed(error) from error

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
        damaged: dict[int, str] = {}
        while (step := self._newest(damaged)) is not None:
            try:
                state, meta = self._read(step, like, part)
            except _Damaged as damage:
                damaged[step] = str(damage)
                continue
            # Those that are gone were not damaged: another process keeps only its newest.
            bad = {n: why for n, why in damaged.items() if (self.folder / str(n)).exists()}
            for number, why in bad.items():
                message = f"checkpoint of step {number} is damaged ({why}); using step {step}"
                warnings.warn(f"{message} instead", CheckpointWarning, stacklevel=2)
            self._damaged = set(bad)
            return Restored(step, state, meta)
        for step, why in damaged.items():
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole (step {step}: {why}); "
                "restore the folder from a copy, or start in a new run folder"
            )
        return None

    def _newest(self, tried: dict[int, str]) -> int | None:
        """The newest step on disk that was not tried."""
        if self._read_only:
            self._manager.reload()
        return max((step for step in self.steps() if step not in tried), default=None)

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

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        # An error on its way says more than one of closing.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
            self.close()

    def _read(self, step: int, like: PyTree, part: str | None) -> tuple[PyTree, dict[str, Any]]:
        record = self._read_record(step)
        prefix = "" if part is None else f"{part}."
        wanted = {prefix + name: leaf for name, leaf in leaves.flatten(like).items()}
        saved = {n: leaf for n, leaf in record["leaves"].items() if n.startswith(prefix)}
        leaves.require_same(saved, wanted, f"the checkpoint of step {step}")
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in leaves.stored(wanted).items()
        }
        try:
            if not abstract:
                state = {}
            elif part is None:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
                state = self._manager.restore(step, args=args)["state"]
            else:
                state = _read_some(self.folder / str(step) / "state", abstract)
        except Exception as error:
            raise _Damaged(_one_line(error)) from error
        state |= {name: leaves.empty(x) for name, x in wanted.items() if not x.size}
        found = fingerprints(state)
        bad = [name for name in found if found[name] != record["fingerprints"][name]]
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise _Damaged(f"the values of leaf {bad[0]}{more} are not those saved")
        whole = [state[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), whole), record["meta"]

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

    def _require_folder(self) -> None:
        """Orbax would make the folder again, without the run around it."""
        if "://" not in os.fspath(self.folder) and not self.folder.is_dir():
            raise FileNotFoundError(2, "the folder is gone")

    def _failed(self, error: Exception) -> SaveError:
        """Make the manager one of what is on disk, without the half of a checkpoint."""
        what = "a checkpoint" if self._saving is None else f"the checkpoint of step {self._saving}"
        kept = ""
        with contextlib.suppress(Exception):
            self._manager.close()
        with contextlib.suppress(Exception):
            self._require_folder()
            self._manager = self._open()
            kept = f" (step {self.steps()[-1]} and those before it are whole)"
        return SaveError(
            f"{what} could not be written to {self.folder}: {_reason(error)}{kept}; "
            "make room or fix the permissions, then start the same command again"
        )


def _read_some(path: epath.Path, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Some of the leaves of a saved state; the manager reads all or none."""
    how = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(abstract, restore_args=how, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path, args=args)


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _require_json(meta: dict[str, Any]) -> None:
    try:
        json.dumps(meta)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the meta data of a checkpoint cannot be JSON ({one_line(error)}); simplify it"
        ) from error


def _reason(error: BaseException) -> str:
    """Why the system refused, in its words: tensorstore hides them behind long paths."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None)
    return reason or _one_line(error)


def _one_line(error: BaseException) -> str:
    text = one_line(error)
    return text if len(text) <= 200 else text[:197] + "..."
