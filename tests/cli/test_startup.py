"""What a program sets before JAX is imported: the allocator, the cache of compiled programs."""

import os
import subprocess
import sys

import pytest

from nestedjax.cli import compile_cache

COUNT = """
import os, sys
from nestedjax.cli import _prepare
_prepare(sys.argv[1])
import jax
print(jax.config.jax_compilation_cache_dir)
from nestedjax.cli.allocator import keep_pages
print(keep_pages())
"""


def started(command, **environment):
    own = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, command],
        env=own | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [*done.stdout.split(), done.stderr]


def test_compiled_programs_are_kept_in_the_users_cache_folder(tmp_path):
    folder, _, err = started("train", XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith(f"{tmp_path}/nestedjax/xla/") and os.path.isdir(folder) and not err
    own = started("train", NESTEDJAX_CACHE=str(tmp_path / "own"))[0]
    assert own.startswith(f"{tmp_path}/own/")
    assert started("train", NESTEDJAX_CACHE="off")[0] == "None"
    assert started("levels", XDG_CACHE_HOME=str(tmp_path))[0] == "None"
    assert started("train", JAX_COMPILATION_CACHE_DIR="/elsewhere")[0] == "/elsewhere"


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    folder, _, err = started("train", NESTEDJAX_CACHE=str(tmp_path / "file" / "below"))
    assert folder == "None" and err.count("\n") == 1 and "no compile cache" in err


def test_the_cache_stays_small(tmp_path):
    for number in range(5):
        path = tmp_path / str(number)
        path.write_bytes(b"x" * 100)
        os.utime(path, (number, number))
    compile_cache._prune(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_pages_are_kept_only_where_the_user_says_nothing_else():
    assert started("levels")[1] == "kept"
    assert started("levels", NESTEDJAX_ALLOCATOR="system")[1] == "system"
    assert started("levels", GLIBC_TUNABLES="glibc.malloc.arena_max=2")[1] == "user"
