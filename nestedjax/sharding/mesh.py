"""The device mesh of a run: four axes, each of a size that the user gives."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from nestedjax.sharding.errors import MeshError

AXES = ("data", "fsdp", "tensor", "sequence")


def make_mesh(
    sizes: str | Mapping[str, int],
    *,
    explicit: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Arrange all devices in a mesh with the axes `data, fsdp, tensor, sequence`.

    Args:
      sizes: devices along each axis, as "data=2,fsdp=2,tensor=2" or a dict; axes left out have 1.
      explicit: True makes Explicit axes: the sharding of every value is part of its type, and a
        mismatch is an error at trace time. False makes Auto axes: the compiler resolves a mismatch
        by moving data.
      devices: to be arranged; default all of them, of all processes.

    Raises:
      MeshError: an axis that does not exist, a size that is not a positive integer, or a product
        that is not the number of devices; the message says what would fit.

    Example:
      >>> import jax
      >>> dict(make_mesh("data=1", devices=jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1}
    """
    asked = _parse(sizes) if isinstance(sizes, str) else dict(sizes)
    for name, size in asked.items():
        if name not in AXES:
            raise MeshError(f"the mesh has no axis {name!r}; its axes are {', '.join(AXES)}")
        if not isinstance(size, int) or size < 1:
            raise MeshError(f"{name}={size}: the size of a mesh axis is a positive integer")
    shape = [asked.get(name, 1) for name in AXES]
    devices = list(jax.devices() if devices is None else devices)
    if math.prod(shape) != len(devices):
        raise MeshError(
            f"mesh {_text(shape)} needs {math.prod(shape)} devices and there are {len(devices)}; "
            f"{_text(_nearest(shape, len(devices)))} fits"
        )
    types = (AxisType.Explicit if explicit else AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(shape), AXES, axis_types=types, devices=devices)


def _parse(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not size.isdecimal():
            raise MeshError(f"mesh {part!r}: write axis=size, such as data=2,fsdp=2,tensor=2")
        if name in sizes:
            raise MeshError(f"mesh {text!r} gives {name} twice; give it once")
        sizes[name] = int(size)
    return sizes


def _text(shape: Sequence[int]) -> str:
    named = [f"{name}={size}" for name, size in zip(AXES, shape, strict=True) if size > 1]
    return ",".join(named) or "data=1"


def _nearest(shape: Sequence[int], count: int) -> list[int]:
    """As much of each size as divides `count`, the innermost first; `data` takes the rest."""
    fits = list(shape)
    for i in reversed(range(1, len(AXES))):
        fits[i] = math.gcd(shape[i], count)
        count //= fits[i]
    return [count, *fits[1:]]
