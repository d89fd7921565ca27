"""Commands in processes of their own, and small file systems to break under them."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.cli.tiny import RUN, TRANSFORMER, flags

CODE = "import sys; from nestedjax.cli import main; sys.exit(main())"
SOON = 20  # seconds in which a process ends after a fault or a signal


class Process:
    """A command that runs; its lines arrive as it writes them."""

    def __init__(self, arguments, cache, **options):
        self.out, self.err = [], []
        self.running = subprocess.Popen(
            [sys.executable, "-c", CODE, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | environment(cache),
            **options,
        )
        streams = ((self.running.stdout, self.out), (self.running.stderr, self.err))
        self._threads = [threading.Thread(target=self._read, args=pair) for pair in streams]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _read(stream, lines):
        for line in stream:
            lines.append(line.rstrip("\n"))

    def wait_for(self, true, seconds=120):
        """Wait until `true()`, while the process lives."""
        end = time.monotonic() + seconds
        while not true():
            assert self.running.poll() is None, (self.running.returncode, self.out, self.err)
            assert time.monotonic() < end, (self.out, self.err)
            time.sleep(0.01)

    def said(self, words):
        return any(words in line for line in (*self.out, *self.err))

    def send(self, number=signal.SIGTERM):
        self.running.send_signal(number)

    def end(self, seconds=SOON):
        """The exit code of a process that is about to end."""
        try:
            code = self.running.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s: {self.out} {self.err}")
        for thread in self._threads:
            thread.join()
        return code

    def kill(self):
        if self.running.poll() is None:
            self.running.kill()
        self.end()
        for stream in (self.running.stdout, self.running.stderr):
            stream.close()


def environment(cache):
    """What a process finds in its environment: a CPU, and what others have compiled."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def arguments(folder, text, *changes):
    """A run without an end, unless the changes say so."""
    settings = flags(*TRANSFORMER, *RUN, "--steps", "1000000", *changes)
    return ["train", "transformer_nano", "--run", folder, "--data", text, *settings]


@contextmanager
def small_disk(folder, size="4m"):
    """A file system of its own in memory."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    """Take all the room that is left; returns the file to remove."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def saved_steps(folder):
    with suppress(FileNotFoundError):
        return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    return []
