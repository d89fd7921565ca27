"""TensorBoard's event files, written in the thread that calls.

tensorboardX's `SummaryWriter` hands events to a thread through a queue. A full disk ends that
thread, the queue fills, and its caller waits for ever. Its `RecordWriter` has neither.
"""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Any


class EventFile:
    """Scalars by step, in a new event file.

    Args:
      folder: of event files; made if missing.
      purge_step: what earlier files say of this step and later ones is not shown.

    Raises:
      OSError: the file cannot be made; on remote file systems also errors of theirs.
    """

    def __init__(self, folder: str | os.PathLike, *, purge_step: int):
        from tensorboardX.proto import event_pb2, summary_pb2  # slow to import
        from tensorboardX.record_writer import RecordWriter, directory_check

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        path, now = os.fspath(folder), time.time_ns()
        directory_check(path)
        # With nanoseconds: a run that continues within the same second would empty the file.
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
        self._writer = RecordWriter(os.path.join(path, name))
        self._write(0, file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(purge_step, session_log=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars of a step.

        Raises:
          OSError: they could not be written.
        """
        value = self._summary.Value
        found = [value(tag=key, simple_value=float(x)) for key, x in values.items()]
        self._write(step, summary=self._summary(value=found))

    def flush(self) -> None:
        """Hand everything to the file system.

        Raises:
          OSError: it could not be written.
        """
        self._writer.flush()

    def close(self) -> None:
        """Close the file, whether or not what is left of it can be written."""
        with contextlib.suppress(Exception):
            self._writer.close()

    def _write(self, step: int, **what: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, **what)
        self._writer.write(event.SerializeToString())
