"""What a command sets before JAX starts: the allocator and the compile cache."""

import os
import subprocess
import sys

import pytest

from nestedjax.cli import allocator, compile_cache

FAULTS = """
import ctypes, resource
from nestedjax.cli.allocator import keep_pages
how = keep_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
counts = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(how, counts[0], counts[-1])
"""
COMPILE = """
from nestedjax.cli.compile_cache import use_compile_cache
use_compile_cache()
import jax
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: x * 2 + 1)(3.0)
print(sum(name.endswith("cache_hits") for name in hits), jax.config.jax_compilation_cache_dir)
"""


def run(code, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NESTEDJAX", "JAX_COMP"))}
    kept |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=kept | {key: str(value) for key, value in environment.items()},
    )
    return done.stdout.split(), done.stderr


def glibc():
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):
        return False


@pytest.mark.skipif(not glibc(), reason="not glibc")
def test_freed_memory_is_kept():
    pages = 2**26 // os.sysconf("SC_PAGE_SIZE")
    (how, first, last), _ = run(FAULTS)
    assert how == "kept" and int(first) > 0.9 * pages and int(last) < 0.1 * pages
    (how, first, last), _ = run(FAULTS, NESTEDJAX_ALLOCATOR="system")
    assert how == "system" and int(last) > 0.9 * pages
    assert run(FAULTS, GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0][0] == "user"


def test_nothing_is_set_in_a_process_that_has_jax():
    assert allocator.keep_pages() == "system"
    compile_cache.use_compile_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_the_second_process_compiles_nothing(tmp_path):
    (hits, folder), _ = run(COMPILE, XDG_CACHE_HOME=tmp_path)
    assert hits == "0" and folder.startswith(str(tmp_path / "nestedjax" / "xla"))
    (hits, again), error = run(COMPILE, XDG_CACHE_HOME=tmp_path)
    assert int(hits) > 0 and again == folder
    assert "rror" not in error  # nor a warning about the processor it was compiled for


def test_another_folder_or_none(tmp_path):
    assert run(COMPILE, NESTEDJAX_CACHE="off", XDG_CACHE_HOME=tmp_path)[0] == ["0", "None"]
    assert not list(tmp_path.iterdir())
    (_, folder), _ = run(COMPILE, NESTEDJAX_CACHE=tmp_path / "mine")
    assert folder.startswith(str(tmp_path / "mine"))
    (_, folder), _ = run(COMPILE, JAX_COMPILATION_CACHE_DIR=tmp_path / "jax")
    assert folder == str(tmp_path / "jax")
    (tmp_path / "file").touch()
    (hits, folder), error = run(COMPILE, NESTEDJAX_CACHE=tmp_path / "file" / "below")
    assert (hits, folder) == ("0", "None")
    assert error.startswith("nestedjax: no compile cache: ") and error.count("\n") == 1


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    for age, name in enumerate(["new", "middle", "old"]):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    compile_cache._prune(tmp_path, 1000)
    assert len(list(tmp_path.iterdir())) == 3
    compile_cache._prune(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "new"]
    os.utime(tmp_path / "middle", (2e9, 1e9 - 1))  # read since
    compile_cache._prune(tmp_path, 150)
    assert [path.name for path in tmp_path.iterdir()] == ["middle"]
