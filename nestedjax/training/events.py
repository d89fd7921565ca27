"""What the loop tells those who watch it, and its clock."""

import time
from typing import NamedTuple

from nestedjax.training.metrics import Record


class Started(NamedTuple):
    """The loop begins at `step` of `steps`; a step above 0 means that it continues a run."""

    step: int
    steps: int


class Claimed(NamedTuple):
    """The run is written from `step` on: its next dispatch was traced, compiled and sent."""

    step: int


class Stopping(NamedTuple):
    """A signal was heard; told in another thread than the other events, while a dispatch runs.

    Attributes:
      by: its name: `Ctrl-C`, `SIGTERM`, `SIGHUP`.
      now: it is a Ctrl-C after another signal, which raises KeyboardInterrupt as soon as the
        dispatch allows it. Else the run is saved and stops after the dispatch.
    """

    by: str
    now: bool


class Stepped(NamedTuple):
    """Steps up to `step` are done.

    Attributes:
      step: updates done.
      steps: of the run.
      record: metrics of the newest step.
      tokens_per_second: over all processes, not counting compilation, validation and saving; None
        before the first measurement.
      seconds_left: estimated time of the remaining steps, counted in the same way; None before the
        first measurement.
    """

    step: int
    steps: int
    record: Record
    tokens_per_second: float | None
    seconds_left: float | None


class Validated(NamedTuple):
    """A validation pass after `step` gave `metrics`."""

    step: int
    metrics: Record


class Saved(NamedTuple):
    """The checkpoint of `step` is on its way to disk."""

    step: int


KEEP = 0.95  # what the meter multiplies its sums by at every dispatch

Event = Started | Claimed | Stopping | Stepped | Validated | Saved


class Meter:
    """Speed of training as an exponential mean over dispatches.

    Args:
      clock: seconds; for tests.
    """

    def __init__(self, clock=time.perf_counter):
        self._clock = clock
        self._since: float | None = None  # None: the next tick only starts the clock
        self._tokens = self._steps = self._seconds = 0.0

    def pause(self) -> None:
        """Forget the time until the next `start`."""
        self._since = None

    def start(self) -> None:
        """Begin to measure, unless already measuring."""
        if self._since is None:
            self._since = self._clock()

    def tick(self, tokens: int, steps: int) -> None:
        """Count a dispatch of so many tokens and steps that has just ended."""
        now = self._clock()
        if self._since is not None:
            self._tokens = KEEP * self._tokens + tokens
            self._steps = KEEP * self._steps + steps
            self._seconds = KEEP * self._seconds + now - self._since
        self._since = now

    def tokens_per_second(self) -> float | None:
        """The speed, None until a dispatch was measured."""
        return self._tokens / self._seconds if self._seconds else None

    def seconds_left(self, steps: int) -> float | None:
        """The time that so many steps will take."""
        return steps * self._seconds / self._steps if self._steps else None
