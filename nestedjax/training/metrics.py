"""Recording metrics: JSON lines that are exact across a kill and a resume, and TensorBoard.

`metrics.jsonl` has exactly one line for each step and holds nothing that depends on the clock, so
that an interrupted run ends with the same file as one that never stopped. Timings go to
TensorBoard. JSON has no numbers that are not finite: they are written as the strings `NaN`,
`Infinity` and `-Infinity`, and read back as numbers.

Metrics that cannot be written cost a warning and no training.
"""

import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from etils import epath

from nestedjax.errors import ConfigError, RunWarning, one_line
from nestedjax.training.tensorboard import EventFile

Record = dict[str, Any]  # `step` and the scalar metrics of that step

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Writes `metrics.jsonl` and, if asked, TensorBoard events into a run folder.

    Lines are buffered until `flush`, which the loop calls before it saves a checkpoint: every
    step up to a checkpoint is then in the file, and `resume` drops those behind it. Lines that
    cannot be written stay in memory, and go into the file as soon as there is room for them.

    Args:
      folder: of the run; made if missing.
      tensorboard: also write event files under `folder/tensorboard`.

    Warns:
      RunWarning: once for each file that cannot be written, with the reason and what is lost.
    """

    def __init__(self, folder: str | os.PathLike, *, tensorboard: bool = True):
        self.path = epath.Path(folder) / "metrics.jsonl"
        self._events = epath.Path(folder) / "tensorboard" if tensorboard else None
        self._lines: list[str] = []
        self._writer: EventFile | None = None
        self._told = False
        # Those of remote file systems are their own.
        remote = "://" in os.fspath(self.path)
        self._errors: type[Exception] = Exception if remote else OSError
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except self._errors as error:
            self._tell(error)

    def resume(self, step: int) -> None:
        """Continue after `step`: drop the lines of later steps, by one atomic replacement.

        Warns:
          RunWarning: there are lines that are no records; the file was kept under another name.
        """
        try:
            if self.path.exists():
                _drop_after(self.path, step)
        except self._errors as error:
            self._tell(error)
        if self._events is not None:
            try:
                self._writer = EventFile(self._events, purge_step=step + 1)
            except self._errors as error:
                self._no_events(error)

    def write(self, record: Record, timing: Mapping[str, float]) -> None:
        """Record one step.

        Args:
          record: `step` and the metrics of that step; a line of the file.
          timing: what depends on the clock; only for TensorBoard.
        """
        self._lines.append(json.dumps(_as_json(record), allow_nan=False) + "\n")
        if self._writer is not None:
            values = {key: value for key, value in {**record, **timing}.items() if key != "step"}
            try:
                self._writer.write(int(record["step"]), values)
            except self._errors as error:
                self._no_events(error)

    def flush(self) -> None:
        """Hand all lines written so far to the file system."""
        try:
            if self._lines:
                _append(self.path, "".join(self._lines).encode())
            self._lines = []
        except self._errors as error:
            self._tell(error)
        if self._writer is not None:
            try:
                self._writer.flush()
            except self._errors as error:
                self._no_events(error)

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
        if kind is not None:  # no checkpoint is as new as these lines, and the folder may be lost
            self._lines = []
        self.close()

    def _tell(self, error: Exception) -> None:
        if not self._told:
            lost = "their lines are kept in memory and lost unless there is room before the end"
            first = json.loads(self._lines[0])["step"] if self._lines else 1
            _warn(f"cannot write {self.path} from step {first} on ({_why(error)}); {lost}")
        self._told = True

    def _no_events(self, error: Exception) -> None:
        _warn(f"cannot write {self._events} ({_why(error)}); the curves in TensorBoard end here")
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def read_metrics(folder: str | os.PathLike) -> list[Record]:
    """The records of a run, one a step; a line that a kill cut short is left out.

    Warns:
      RunWarning: other lines are no records either; they are left out, too.

    Raises:
      ConfigError: the folder holds no `metrics.jsonl`, or it cannot be read.
    """
    path = epath.Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise ConfigError(f"no metrics.jsonl in {os.fspath(folder)}; is it a run folder?")
    try:
        lines = _lines_of(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({_why(error)}); restore it from a copy") from error
    if bad := _damaged(lines):
        _warn(f"{path}: {_which(bad)} and left out")
    return [record for line in lines if (record := _record(line)) is not None]


def _lines_of(path: epath.Path) -> list[bytes]:
    *whole, rest = path.read_bytes().split(b"\n")
    return [line + b"\n" for line in whole] + ([rest] if rest else [])


def _record(line: bytes) -> Record | None:
    """What a line holds; None if it is no record of a step."""
    if not line.endswith(b"\n"):  # a kill in the middle of a write leaves half a line
        return None
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        return None
    return {k: _WORDS.get(v, v) if isinstance(v, str) else v for k, v in found.items()}


def _as_json(record: Record) -> Record:
    words = {math.inf: "Infinity", -math.inf: "-Infinity"}
    return {
        key: words.get(value, "NaN")
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in record.items()
    }


def _damaged(lines: list[bytes]) -> list[int]:
    """The numbers of the whole lines that are no records."""
    return [i for i, x in enumerate(lines, 1) if x.endswith(b"\n") and _record(x) is None]


def _which(bad: list[int]) -> str:
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"line {bad[0]}{more} {'are no records' if more else 'is no record'}"


def _drop_after(path: epath.Path, step: int) -> None:
    """Keep the lines of the steps up to `step`; the file goes aside if it was damaged."""
    lines = _lines_of(path)
    records = [(_record(line), line) for line in lines]
    kept = [line for record, line in records if record is not None and record["step"] <= step]
    if bad := _damaged(lines):
        aside = path.parent / f"metrics-damaged-{time.time_ns()}.jsonl"
        aside.write_bytes(b"".join(lines))
        _warn(f"{path}: {_which(bad)} and left out; the file was kept as {aside.name}")
    if len(kept) < len(lines):
        temporary = path.parent / (path.name + ".tmp")
        try:
            temporary.write_bytes(b"".join(kept))
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _append(path: epath.Path, data: bytes) -> None:
    """Append all of it, or none."""
    if "://" in os.fspath(path):  # objects in a bucket cannot be appended to
        path.write_bytes((path.read_bytes() if path.exists() else b"") + data)
        return
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def _warn(message: str) -> None:
    warnings.warn(message, RunWarning, stacklevel=3)


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)
