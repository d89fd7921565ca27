"""Showing how a run goes: a bar on a terminal's standard error, lines on standard output."""

import os
import sys

from tqdm import tqdm

from nestedjax.cli.errors import INTERRUPTED
from nestedjax.cli.output import say
from nestedjax.cli.printing import printable
from nestedjax.run import Began, Event, Sampled
from nestedjax.training import Started, Stepped, Stopping, Validated

SHOWN = 120  # characters of a sample


class Progress:
    """Told of a run's events.

    The bar is drawn only where standard error is a terminal; every validation prints a line.

    Args:
      folder: of the run.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._bar: tqdm | None = None
        self._newest: Stepped | None = None
        self._steps = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, Began):
            self._describe(event)
        elif isinstance(event, Started):
            self._begin(event)
        elif isinstance(event, Stopping):
            self._stop(event)
        elif isinstance(event, Sampled) and event.step < self._steps:  # the last is a longer one
            lines = printable(event.text[:SHOWN]).strip("\n").split("\n")
            self.write("\n".join("    | " + line for line in lines))
        elif isinstance(event, Stepped):
            self._newest = event
            if self._bar is not None:
                self._bar.update(event.step - self._bar.n)
                self._bar.set_postfix_str(f"loss {event.record['loss']:.3f}{_pace(event)}")
        elif isinstance(event, Validated):
            record = event.metrics
            pace = "" if self._newest is None else _pace(self._newest)
            self.write(
                f"step {event.step}/{self._steps}  loss {record['loss']:.4f}"
                f"  val_loss {record['val_loss']:.4f}{pace}"
            )

    def write(self, text: str) -> None:
        """Print text above the bar."""
        with tqdm.external_write_mode(file=sys.stdout):
            say(text)

    def _stop(self, event: Stopping) -> None:
        """Say that a signal was heard; end the process if it is to end now.

        What was saved is whole at any moment, and only the process itself can be ended while the
        main thread waits for the device or the compiler.
        """
        if event.now:
            say("\ninterrupted", error=True)
            os._exit(INTERRUPTED)
        line = "\n" if self._bar is not None and not self._bar.disable else ""
        again = "; Ctrl-C again to stop now" if event.by == "Ctrl-C" else ""
        say(f"{line}{event.by}: stopping after this dispatch, and saving{again}", error=True)

    def _describe(self, event: Began) -> None:
        data = event.run.data
        text = ", ".join(data.files) or "the bundled text"
        self.write(
            f"{event.run.preset}: {event.parameters:,} parameters, vocabulary of"
            f" {event.run.model.vocab}; {event.tokens:,} training tokens of {text}"
        )
        self._rows = f"{data.batch} x {data.length}"

    def _begin(self, event: Started) -> None:
        self._steps = event.steps
        begin = "begins" if event.step == 0 else f"continues at step {event.step}"
        self.write(
            f"{self._folder} {begin}: {event.steps} steps of {self._rows} tokens; compiling ..."
        )
        # None: draw nothing where standard error is no terminal.
        self._bar = tqdm(
            total=event.steps,
            initial=event.step,
            unit="step",
            disable=None,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}",
        )


def _pace(event: Stepped) -> str:
    if event.tokens_per_second is None or event.seconds_left is None:
        return ""
    left = tqdm.format_interval(event.seconds_left)
    return f"  {event.tokens_per_second:,.0f} tokens/s  {left} left"
