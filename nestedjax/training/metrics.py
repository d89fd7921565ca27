"""Recording metrics: JSON lines that are exact across a kill and a resume, and TensorBoard.

`metrics.jsonl` has exactly one line for each step and holds nothing that depends on the clock, so
that an interrupted run ends with the same file as one that never stopped. Timings go to
TensorBoard.
"""

import json
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from etils import epath

Record = dict[str, Any]  # `step` and the scalar metrics of that step


class MetricsWriter:
    """Writes `metrics.jsonl` and, if asked, TensorBoard events into a run folder.

    Lines are buffered until `flush`, which the loop calls before it saves a checkpoint: every
    step up to a checkpoint is then in the file, and `resume` drops those behind it.

    Args:
      folder: of the run; made if missing.
      tensorboard: also write event files under `folder/tensorboard`.
    """

    def __init__(self, folder: str | os.PathLike, *, tensorboard: bool = True):
        self.path = epath.Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._events = epath.Path(folder) / "tensorboard" if tensorboard else None
        self._lines: list[str] = []
        self._writer = None

    def resume(self, step: int) -> None:
        """Continue after `step`: drop the lines of later steps, by one atomic replacement."""
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                _replace(self.path, "".join(kept))
        if self._events is not None:
            from tensorboardX import SummaryWriter  # costs start-up time

            self._writer = SummaryWriter(os.fspath(self._events), purge_step=step + 1)

    def write(self, record: Record, timing: Mapping[str, float]) -> None:
        """Record one step.

        Args:
          record: `step` and the metrics of that step; a line of the file.
          timing: what depends on the clock; only for TensorBoard.
        """
        self._lines.append(json.dumps(dict(record)) + "\n")
        if self._writer is not None:
            for key, value in {**record, **timing}.items():
                if key != "step":
                    self._writer.add_scalar(key, value, int(record["step"]))

    def flush(self) -> None:
        """Hand all lines written so far to the file system."""
        text = "".join(self._lines)
        if "://" in os.fspath(self.path):  # objects in a bucket cannot be appended to
            old = self.path.read_text() if self.path.exists() else ""
            self.path.write_text(old + text)
        elif text:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        self._lines = []
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(folder: str | os.PathLike) -> list[Record]:
    """The records of a run, one a step; a line that a kill cut short is left out.

    Raises:
      ValueError: the folder holds no `metrics.jsonl`.
    """
    path = epath.Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"no metrics.jsonl in {os.fspath(folder)}; is it a run folder?")
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if _step_of(line) != float("inf")]


def _step_of(line: str) -> int | float:
    # A kill in the middle of a write leaves half a line; no checkpoint is as new as that line.
    if not line.endswith("\n"):
        return float("inf")
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _replace(path: epath.Path, text: str) -> None:
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
