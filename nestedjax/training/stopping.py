"""Stopping a run from outside: a signal finishes the dispatch, saves, and stops."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

# Told of a signal's name, and whether it asks to end at once because one was heard before.
Told = Callable[[str, bool], None]


@contextmanager
def stop_signals(told: Told | None = None) -> Iterator[Callable[[], str | None]]:
    """Turn SIGTERM, SIGHUP and the first Ctrl-C into a request; the next Ctrl-C interrupts.

    Outside the main thread, where Python allows no handlers, nothing is installed. A SIGHUP that
    is ignored (`nohup`) stays so. With `jax.distributed` initialised SIGTERM is left to JAX, which
    agrees on one step for all processes (`Checkpoints.reached_preemption`).

    Args:
      told: hears of a signal at once, in a thread of its own: the main thread runs no handler
        while it waits for the device or the compiler.

    Yields:
      A function that returns the name of the signal that asked to stop, or None.
    """
    asked: list[str] = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(_name(number))

    numbers = _numbers()
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        if numbers and told is not None:
            with _heard(numbers, told):
                yield lambda: asked[0] if asked else None
        else:
            yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _heard(numbers: list[signal.Signals], told: Told) -> Iterator[None]:
    """Tell of signals by the pipe that Python's C handler writes their numbers to."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def listen() -> None:
        heard = 0
        while (number := os.read(read, 1)) != b"\0":
            if number[0] in numbers:
                told(_name(number[0]), heard > 0 and number[0] == signal.SIGINT)
                heard += 1

    thread = threading.Thread(target=listen, name="stop signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)


def _numbers() -> list[signal.Signals]:
    if threading.current_thread() is not threading.main_thread():
        return []
    if jax.distributed.is_initialized():
        return [signal.SIGINT]
    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is signal.SIG_DFL:
        numbers.append(hangup)
    return numbers


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
