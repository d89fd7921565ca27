"""One process at a time trains a run: its lock is a file in the run folder.

The kernel frees a lock (`flock`) when its process ends, however it ends. Where no kernel can see
that process, because it runs on another machine or the folder is in a bucket, the lock is a lease:
its file is renewed every `BEAT` seconds and expires after `EXPIRY` seconds without. Reading a run
needs no lock.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from etils import epath

from nestedjax.errors import ConfigError
from nestedjax.training import TrainingError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

NAME = "lock"
BEAT, EXPIRY = 15.0, 120.0  # seconds


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[Callable[[], None]]:
    """Hold the lock of a run folder, which is made if missing.

    Of a run of several processes, process 0 holds it for all.

    Args:
      folder: of the run.

    Yields:
      `require()`, which raises `TrainingError` if the lock was lost: the folder was removed, or
      another process took over while this one could not renew its lease.

    Raises:
      ConfigError: another process trains this run, named with its host and number; or the folder
        cannot be written.
    """
    lock, refused = None, None
    if jax.process_index() == 0:
        try:
            lock = _Lock(folder)
        except ConfigError as error:
            refused = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        if multihost_utils.broadcast_one_to_all(refused is not None) and refused is None:
            refused = ConfigError(f"process 0 could not lock {os.fspath(folder)}; see its message")
    if refused is not None:
        raise refused
    try:
        yield lambda: None if lock is None else lock.require()
    finally:
        if lock is not None:
            lock.release()


class _Lock:
    def __init__(self, folder: str | os.PathLike):
        self._folder, self._path = os.fspath(folder), epath.Path(folder) / NAME
        self._mine = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": _machine(),
            "token": uuid.uuid4().hex,
        }
        self._file: int | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._locked_file()
            other, age = self._read()
            kernel = self._file is not None and other.get("machine") == self._mine["machine"]
            if other and not kernel and age < EXPIRY:
                raise self._held(other, age)
            self._write()
        except OSError as error:
            self._close()
            raise ConfigError(
                f"cannot write the run folder {self._folder} ({error.strerror or error}); make"
                " room, fix the permissions, or take another one"
            ) from error
        except ConfigError:
            self._close()
            raise
        self._ended = threading.Event()
        threading.Thread(target=self._renew, name="run lock", daemon=True).start()

    def require(self) -> None:
        """Raise if another process may write to the run."""
        other, _ = self._read()
        if other.get("token") == self._mine["token"]:
            return
        if other:
            raise TrainingError(
                f"{self._who(other)} took over the run folder; leave it to that one"
            )
        raise TrainingError(
            f"the run folder {self._folder} is gone, or cannot be read any more; restore it from a"
            " copy, or start again"
        )

    def release(self) -> None:
        self._ended.set()
        with suppress(OSError, TrainingError):
            self.require()
            self._path.unlink()
        self._close()

    def _locked_file(self) -> int | None:
        """The locked file; None where the file system has no locks."""
        if fcntl is None or "://" in self._folder:
            return None
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                raise self._held(*self._read()) from None
            except OSError:
                os.close(file)
                return None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(self._path)):
                    return file
            os.close(file)  # its holder removed it in between

    def _read(self) -> tuple[dict[str, Any], float]:
        """Who holds the lock (nobody: an empty dict), and seconds since it was renewed."""
        try:
            found, status = json.loads(self._path.read_text()), self._path.stat()
        except (OSError, ValueError):
            return {}, 0.0
        return found if isinstance(found, dict) else {}, time.time() - float(status.mtime)

    def _write(self) -> None:
        text = json.dumps(self._mine)
        if self._file is None:
            self._path.write_text(text)
            if self._read()[0] != self._mine:  # another one wrote at the same moment
                raise self._held(*self._read())
            return
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)
        os.fsync(self._file)

    def _renew(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError, TrainingError):
                if self._file is not None:
                    os.utime(self._file)  # needs no room on the disk
                else:
                    self.require()
                    self._write()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _held(self, other: dict[str, Any], age: float) -> ConfigError:
        lease = ""
        if other and other.get("machine") != self._mine["machine"]:
            lease = (
                f", or, if that process is gone, wait until its lock expires in"
                f" {max(EXPIRY - age, 1):.0f} s"
            )
        return ConfigError(
            f"{self._who(other)} trains {self._folder}: wait for it or stop it{lease}; or take"
            " another run folder"
        )

    @staticmethod
    def _who(other: dict[str, Any]) -> str:
        if not other:
            return "another process"
        return "process {process} on {host} (since {since})".format_map(
            {"process": "?", "host": "?", "since": "?"} | other
        )


def _machine() -> str:
    """The kernel that this process runs on; names of hosts are neither unique nor constant."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
