"""Files of text: which ones some paths name, and what is in them, as UTF-8 wherever it can be."""

import codecs
import os
import stat
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from etils import epath

from nestedjax.data.errors import DataError, DataWarning
from nestedjax.errors import shown

FilePath = str | os.PathLike
Files = FilePath | Sequence[FilePath]

LINES = (".jsonl", ".ndjson")  # one document a line
TEXT = (".txt", *LINES)
EXTRAS = {"gs": "gcs", "s3": "s3"}  # the extra of this package that reads a kind of path

# How packed files end and begin, and the module of the standard library that unpacks them.
PACKED = {
    ".gz": (b"\x1f\x8b\x08", "gzip"),
    ".bz2": (b"BZh91AY&SY", "bz2"),
    ".xz": (b"\xfd7zXZ\x00", "lzma"),
}
# What is no text although its bytes could be trained on.
OTHERS = {
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it with zstd -d",
    b"\x04\x22\x4d\x18": "packed by lz4; unpack it with lz4 -d",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"PAR1": "a parquet file; write its text to a .jsonl file",
    b"ARROW1": "an arrow file; write its text to a .jsonl file",
    b"%PDF-": "a PDF; extract its text",
}
UNREAD = (".zst", ".zstd", ".lz4", ".br")  # text that a folder holds and that nothing here unpacks
# The first that fits decides: the mark of UTF-32 begins like that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def file_names(files: Any, *, what: str = "files") -> tuple[str, ...]:
    """The paths that a caller gave, as text.

    Args:
      files: one path or a list of them.
      what: the name of the argument, for the message.

    Raises:
      DataError: it is of another type, or a path is empty.
    """
    paths = [files] if isinstance(files, str | os.PathLike) else files
    if not isinstance(paths, list | tuple):
        raise DataError(f"{what}={shown(files)} is a {type(files).__name__}; give a path or a list")
    found = []
    for path in paths:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise DataError(f"{what}={shown(path)} is no path; name a file or folder")
        found.append(os.fsdecode(path))
    return tuple(found)


@contextmanager
def reading(path: FilePath) -> Iterator[epath.Path]:
    """The path to read from; what goes wrong with it becomes one line.

    Args:
      path: of a file or folder: local, gs:// or s3://.

    Raises:
      DataError: it cannot be read here, or not at all.
    """
    name = os.fspath(path)
    if not name:
        raise DataError("the name of a file is empty; name a file or folder")
    scheme = name.partition("://")[0] if "://" in name else None
    if scheme in ("http", "https", "ftp"):
        raise DataError(f"{name} is not read from the web; download it and name the file")
    if scheme is not None and scheme not in EXTRAS:
        raise DataError(f"{name}: no {scheme}:// is read, only gs:// and s3://; copy it first")
    try:
        yield epath.Path(path)
    except DataError:
        raise
    except ImportError as error:
        extra = EXTRAS.get(scheme or "")
        fix = f'pip install "nestedjax[{extra}]"' if extra else "install it, or use another file"
        raise DataError(f"{name} cannot be read ({error}): {fix}") from error
    except FileNotFoundError as error:
        raise DataError(f"file not found: {name}; check the path") from error
    except OSError as error:
        why = error.strerror or " ".join(str(error).split())
        raise DataError(
            f"cannot read {name} ({why}); check the path and its permissions"
        ) from error
    except Exception as error:
        if scheme is None:
            raise
        # Whatever a store's own library raises: no login, no bucket.
        raise DataError(f"cannot read {name} ({' '.join(str(error).split())})") from error


def expand(files: Files) -> list[epath.Path]:
    """List the files that paths name; a folder stands for the text files at any depth in it.

    Files of a folder come in the order of their names. Hidden files, and files that are not named
    as text is (.txt, .jsonl, .ndjson, and any name that ends in .gz, .bz2 or .xz) are left out.

    Warns:
      DataWarning: what was left out of a folder.

    Raises:
      DataError: a path cannot be read, is named twice, or is a folder without text.
    """
    names = file_names(files)
    if not names:
        raise DataError("no text file given; name at least one file or folder")
    found: list[epath.Path] = []
    for name in names:
        with reading(name) as path:
            if path.is_dir():
                found.extend(_inside(path))
            elif path.exists():
                found.append(path)
            else:
                raise DataError(f"file not found: {path}; check the path")
    seen: dict[str, epath.Path] = {}
    for path in found:
        place = os.fspath(path) if "://" in os.fspath(path) else os.path.realpath(path)
        if place in seen:
            also = "" if seen[place] == path else f" (also as {seen[place]})"
            raise DataError(f"{path} is named twice{also}, and would count twice; name it once")
        seen[place] = path
    return found


def read_file(path: FilePath, *, once: bool = False) -> bytes:
    """What is in a file: unpacked, as UTF-8 if a mark says that it is UTF-16 or 32, without mark.

    Args:
      path: of a file: gzip, bzip2 and xz are unpacked, whatever its name.
      once: whether it may be a pipe, which cannot be read again when a run continues.

    Raises:
      DataError: it cannot be read, changes while it is read, or is an archive or another format.
    """
    with reading(path) as file:
        before = None if once else _state(file)
        data = file.read_bytes()
        if before is not None and _state(file) != before:
            raise DataError(f"{file} changed while it was read; wait until it is written")
    return as_text(_unpacked(data, os.fspath(path)), os.fspath(path))


def as_text(data: bytes, name: str) -> bytes:
    """Bytes without a byte order mark; UTF-16 and UTF-32 with one become UTF-8.

    Raises:
      DataError: they are of another format, or no whole UTF-16.
    """
    for start, what in OTHERS.items():
        if data.startswith(start):
            raise DataError(f"{name} is {what}")
    if data[257:262] == b"ustar":
        raise DataError(f"{name} is a tar archive; unpack it")
    for mark, encoding in MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding).encode()
            except UnicodeError as error:
                raise DataError(f"{name} is no whole {encoding.upper()}; copy it again") from error
    return data.removeprefix(codecs.BOM_UTF8)


def plain_name(name: str) -> str:
    """A file's name in small letters, without what says that it is packed."""
    name = name.lower()
    return next((name.removesuffix(s) for s in PACKED if name.endswith(s)), name)


def _inside(folder: epath.Path) -> list[epath.Path]:
    """The text files of a folder at any depth; says what else there is."""
    found: list[epath.Path] = []
    hidden: list[str] = []
    others: list[str] = []
    walked: set[str] = set()

    def walk(here: epath.Path) -> None:
        if "://" not in os.fspath(here):
            real = os.path.realpath(here)
            if real in walked:  # a link to a folder above it
                return
            walked.add(real)
        for path in sorted(here.iterdir(), key=lambda p: p.name):
            name = os.fspath(path.relative_to(folder))
            if path.name.startswith("."):
                hidden.append(name)
            elif path.is_dir():
                walk(path)
            elif path.name.lower().endswith(UNREAD):
                raise DataError(f"{path} is packed in a way that is not read here; unpack it first")
            elif path.name.lower().endswith((*TEXT, *PACKED)):
                found.append(path)
            else:
                others.append(name)

    walk(folder)
    if not found:
        raise DataError(
            f"no text in folder {folder}; it needs files named *.txt, *.jsonl, or these and .gz,"
            " .bz2, .xz"
        )
    left = [
        f"{len(n)} {what} ({_some(n)})"
        for n, what in ((others, "not text"), (hidden, "hidden"))
        if n
    ]
    if left:
        warnings.warn(
            f"left out of folder {folder}: {', '.join(left)}; name a file to read it",
            DataWarning,
            stacklevel=3,
        )
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _state(path: epath.Path) -> tuple[int, int] | None:
    """What changes when a local file is written to."""
    if "://" in os.fspath(path):
        return None
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise DataError(
            f"{path} is no file but a folder, pipe or device, and a run reads its text again when"
            " it continues; write it to a file"
        )
    return found.st_size, found.st_mtime_ns


def _unpacked(data: bytes, name: str) -> bytes:
    for suffix, (start, module) in PACKED.items():
        if name.lower().endswith(suffix) or data.startswith(start):
            unpacker = import_module(module)  # here: a Python may be built without some of them
            broken = (OSError, EOFError, zlib.error, getattr(unpacker, "LZMAError", OSError))
            try:
                return unpacker.decompress(data)
            except broken as error:
                kind = {"gzip": "gzip", "bz2": "bzip2", "lzma": "xz"}[module]
                raise DataError(
                    f"{name} is no whole {kind} file ({error}); copy it again"
                ) from error
    return data
