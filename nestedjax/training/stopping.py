"""Stopping a run from outside: SIGTERM and Ctrl-C finish the step, save, and stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax


@contextmanager
def stop_signals() -> Iterator[Callable[[], str | None]]:
    """Turn SIGTERM and the first Ctrl-C into a request; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python allows no handlers, nothing is installed. With
    `jax.distributed` initialised SIGTERM is left to JAX, which agrees on one step for all
    processes (`Checkpoints.reached_preemption`).

    Yields:
      A function that returns the name of the signal that asked to stop, or None.
    """
    asked: list[str] = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    numbers = [signal.SIGINT]
    if not jax.distributed.is_initialized():
        numbers.append(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
