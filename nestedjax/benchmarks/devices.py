"""What a device can do, and how long it worked: peak rates by kind, and the device's own clock."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Peak(NamedTuple):
    """Most that a device does, from its maker's data sheet.

    Attributes:
      flops_per_second: of dense bfloat16 products.
      bytes_per_second: of its main memory.
    """

    flops_per_second: float
    bytes_per_second: float


# By `jax.Device.device_kind`; a v7x chip is two devices.
PEAKS = {
    "TPU v4": Peak(275e12, 1.23e12),
    "TPU v5 lite": Peak(197e12, 0.82e12),
    "TPU v5": Peak(459e12, 2.77e12),
    "TPU v6 lite": Peak(918e12, 1.64e12),
    "TPU7x": Peak(1154e12, 3.69e12),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2.04e12),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12),
    "NVIDIA H200": Peak(989e12, 4.8e12),
}


def roofline(kind: str, flops: float, moved: float, seconds: float) -> float | None:
    """The least time that a device could take, as a fraction of what was taken.

    Args:
      kind: of the device.
      flops: floating-point operations.
      moved: bytes to and from main memory.
      seconds: that they took.

    Returns:
      max(flops / peak, moved / bandwidth) / seconds; None for a device of unknown peaks.
    """
    peak = PEAKS.get(kind)
    if peak is None:
        return None
    return max(flops / peak.flops_per_second, moved / peak.bytes_per_second) / seconds


def seconds(call: Callable[[], Any], repeats: int) -> tuple[float, str]:
    """Seconds of a call that is compiled and warm.

    Args:
      call: returns arrays.
      repeats: calls.

    Returns:
      On an accelerator the mean time that the device was at work, from its profiler, and "device";
      on a CPU, or where the profile says nothing of the device, the median by the host's clock, and
      "host".
    """
    import jax

    if jax.default_backend() != "cpu":
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(repeats):
                    jax.block_until_ready(call())
            busy = _profiled(Path(folder))
        if busy:
            return busy / repeats, "device"
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - started)
    return statistics.median(taken), "host"


def _profiled(folder: Path) -> float:
    from jax.profiler import ProfileData

    files = sorted(folder.rglob("*.xplane.pb"))
    return sum(busy_seconds(ProfileData.from_file(str(path)).planes) for path in files)


def busy_seconds(planes: Iterable[Any]) -> float:
    """Seconds that the first device of a profile was at work.

    Args:
      planes: of `jax.profiler.ProfileData`. A TPU's has a line for whole programs; a GPU's has one
        for each stream, whose events can overlap.
    """
    devices = sorted((p for p in planes if p.name.startswith("/device:")), key=lambda p: p.name)
    if not devices:
        return 0.0
    lines = list(devices[0].lines)
    lines = [line for line in lines if line.name == "XLA Modules"] or lines
    events = sorted((e.start_ns, e.start_ns + e.duration_ns) for line in lines for e in line.events)
    total, end = 0.0, float("-inf")
    for first, last in events:
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return 1e-9 * total
