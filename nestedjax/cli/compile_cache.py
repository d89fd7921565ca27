"""Compiled programs stay in the user's cache folder, so that a second start compiles nothing."""

import hashlib
import os
import platform
import sys
from pathlib import Path

LIMIT = 2 * 2**30  # bytes; the programs that have not been read for longest go first


def use_compile_cache() -> None:
    """Turn on JAX's persistent compilation cache; before JAX is imported.

    The folder is `nestedjax/xla` in `$XDG_CACHE_HOME` or `~/.cache`, with a folder for each kind of
    processor inside: a program compiled for one may not run on another. `NESTEDJAX_CACHE=off` turns
    it off, `NESTEDJAX_CACHE=PATH` names another folder, and `JAX_COMPILATION_CACHE_DIR`, if set, is
    left alone. A folder that cannot be written costs a warning and nothing else.
    """
    asked = os.environ.get("NESTEDJAX_CACHE", "")
    if asked == "off" or "JAX_COMPILATION_CACHE_DIR" in os.environ or "jax" in sys.modules:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    folder = Path(asked or os.path.join(home, "nestedjax", "xla")).expanduser() / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _prune(folder, LIMIT)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"no permission to write in {folder}")
    except OSError as error:
        print(f"nestedjax: no compile cache: {error}", file=sys.stderr)
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    # Also what compiles quickly: a run has dozens of small programs.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _processor() -> str:
    """A name that two processors share only if one runs what is compiled for the other."""
    text = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        text += "".join(line for line in lines if line.startswith(("flags", "Features", "model")))
    except OSError:
        text += platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _prune(folder: Path, limit: int) -> None:
    """Remove the files that were used longest ago until `limit` bytes are left."""
    found = []
    for path in folder.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:  # another process prunes, too
            continue
        found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    size = sum(entry[1] for entry in found)
    for _, bytes_, path in sorted(found):
        if size <= limit:
            return
        path.unlink(missing_ok=True)
        size -= bytes_
