"""Showing how a run goes: a bar on a terminal's standard error, lines on standard output."""

import sys

from tqdm import tqdm

from nestedjax.configs import RunConfig
from nestedjax.data import TextDataset
from nestedjax.training import Event, Started, Stepped, Validated


class Progress:
    """Told of a run's events.

    The bar is drawn only where standard error is a terminal; every validation prints a line.

    Args:
      config: of the run.
      folder: of the run.
      parameters: how many the model has.
      dataset: the training text.
    """

    def __init__(self, config: RunConfig, folder: str, parameters: int, dataset: TextDataset):
        self._config, self._folder = config, folder
        self._parameters, self._tokens = parameters, dataset.tokens
        self._bar: tqdm | None = None
        self._newest: Stepped | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, Started):
            self._begin(event)
        elif isinstance(event, Stepped):
            self._newest = event
            if self._bar is not None:
                self._bar.update(event.step - self._bar.n)
                self._bar.set_postfix_str(f"loss {event.record['loss']:.3f}{_pace(event)}")
        elif isinstance(event, Validated):
            record = event.metrics
            pace = "" if self._newest is None else _pace(self._newest)
            self.write(
                f"step {event.step}/{self._config.loop.steps}  loss {record['loss']:.4f}"
                f"  val_loss {record['val_loss']:.4f}{pace}"
            )

    def write(self, text: str) -> None:
        """Print text above the bar."""
        with tqdm.external_write_mode(file=sys.stdout):
            print(text, flush=True)

    def _begin(self, event: Started) -> None:
        data = self._config.data
        text = ", ".join(data.files) or "the bundled text"
        self.write(
            f"{self._config.preset}: {self._parameters:,} parameters, vocabulary of"
            f" {self._config.model.vocab}; {self._tokens:,} training tokens of {text}"
        )
        begin = "begins" if event.step == 0 else f"continues at step {event.step}"
        self.write(
            f"{self._folder} {begin}: {event.steps} steps of {data.batch} x {data.length} tokens;"
            " compiling ..."
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
