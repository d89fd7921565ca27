"""Refusals as a user meets them: in a process without the type checks that tests import with."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def refusals(module: str) -> dict[str, tuple[str, str]]:
    """The error's type and message of each of the module's `CASES`, called in a process of its own.

    Args:
      module: has `CASES`, a dict of functions without arguments, and calls `report(CASES)` when it
        is run.
    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def report(cases) -> None:
    """Print what `refusals` reads."""
    found = {}
    for name, call in cases.items():
        try:
            call()
            found[name] = ("nothing", "")
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
    print(json.dumps(found))
