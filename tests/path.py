"""Which files a batch passes, and where a configuration climbs: followed through a real run.

    python -m tests.path

trains `hope_nano` for one step as `nestedjax train` does, in this process, and prints every file of
`nestedjax` and `pallas_kernels` in which a function runs between `data[step]` and the updated state
(tracing included, saving and printing not), and every call that hands a configuration from a lower
floor to a higher one.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("nestedjax", "pallas_kernels"))


class Followed:
    """What was seen while a function ran.

    Attributes:
      files: in which a function was entered, in the order of the first entry.
      handed: (caller's file, callee's file, type) of calls that were given a configuration.
    """

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self.handed: dict[tuple[str, str, str], None] = {}

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        # A class body or a module is code that runs at import, not on the way of a batch.
        if event != "call" or not name.startswith(PACKAGES) or frame.f_code.co_name == "<module>":
            return
        self.files[name] = None
        configurations = sorted(_configurations(frame))
        if configurations and (caller := _caller(frame)) is not None:
            for kind in configurations:
                self.handed[caller, name, kind] = None

    def follow(self, function: Any) -> Any:
        """The result of `function()`."""
        before = sys.getprofile()
        sys.setprofile(self)
        try:
            return function()
        finally:
            sys.setprofile(before)


def _configurations(frame: Any) -> set[str]:
    """The types of configurations among a call's arguments."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    values = [frame.f_locals.get(name) for name in code.co_varnames[:count]]
    kinds = {type(v) for v in values if dataclasses.is_dataclass(v) and not isinstance(v, type)}
    return {kind.__name__ for kind in kinds if kind.__name__.endswith("Config")}


def _caller(frame: Any) -> str | None:
    """The nearest file of ours on the stack; None where a test or a library called."""
    above = frame.f_back
    while above is not None and not above.f_code.co_filename.startswith(PACKAGES):
        above = above.f_back
    return None if above is None else above.f_code.co_filename


def module_of(path: str) -> str:
    """`/.../nestedjax/run/data.py` -> `nestedjax.run.data`."""
    parts = Path(path).relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def of_a_step(changes: dict[str, Any], **settings: Any) -> list[str]:
    """The files that a batch passes in one training step of `hope_nano`."""
    import jax
    import jax.numpy as jnp

    import nestedjax as nj
    from nestedjax import run, sharding, training

    config = nj.run_preset("hope_nano", changes, **settings)
    dataset, _ = run.text_of(config, run.tokenizer_of(config))
    built = run.build(config)
    tx, schedule = run.optimizer(config, built.model)
    state = run.new_state(config, built, tx)
    loss = run.language_loss(built.definition)
    dispatch = training.make_dispatch(loss, tx, learning_rate=schedule)
    place = sharding.group_placer(config.loop.microbatches, None)
    followed = Followed()

    def step() -> Any:
        return dispatch(state, jnp.ones((), bool), place([dataset[0]]))

    with jax.numpy_dtype_promotion("standard"):
        jax.block_until_ready(followed.follow(step))
    return [module_of(name) for name in followed.files]


def of_a_run(*flags: str) -> list[tuple[str, str, str]]:
    """(caller, callee, type) of every call that was handed a configuration in `nestedjax train`."""
    from nestedjax.cli import main

    followed = Followed()
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", "hope_nano", "--run", f"{folder}/run", *flags]
        assert followed.follow(lambda: main(command)) == 0
    return [(module_of(a), module_of(b), kind) for a, b, kind in followed.handed]


if __name__ == "__main__":
    files = of_a_step({})
    print(json.dumps(files, indent=1), len(files), "files")
    for caller, callee, kind in of_a_run("--steps", "1"):
        print(f"{kind:24} {caller} -> {callee}")
