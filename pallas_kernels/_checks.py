"""Refusals at the boundary of every operation: one line, with the operation, the value and the fix.

Annotations say what an array is, but only tests execute them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_floats(operation: str, **arrays: Any) -> None:
    """Refuse what is not an array of real floating-point numbers; None passes.

    Raises:
      ValueError: a number or list in place of an array; integers, booleans or complex numbers;
        float64 where jax would round it to float32.
    """
    for name, array in arrays.items():
        if array is None:
            continue
        if not isinstance(array, jax.Array | np.ndarray):
            raise ValueError(
                f"{operation}: {name} is {_shown(array)}, expected a floating-point array: "
                "make it with jnp.asarray, with an axis of tokens if it has one (jnp.full)"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{operation}: {name} is {array.dtype}{list(array.shape)}, expected real "
                "floating-point numbers: cast it with .astype(jnp.float32)"
            )
        check_width(f"{operation}: {name} is", array.dtype)


def check_width(subject: str, dtype: Any) -> None:
    """Refuse float64 where jax would compute in float32.

    Raises:
      ValueError: it is float64, and jax_enable_x64 is off.
    """
    if jnp.dtype(dtype) == jnp.float64 and jnp.zeros(0, float).dtype != jnp.float64:
        raise ValueError(
            f"{subject} float64, which jax rounds to float32: cast it to float32, or call "
            "jax.config.update('jax_enable_x64', True) before anything else"
        )


def check_axes(operation: str, name: str, array: Any, layout: str, least: int) -> None:
    """Refuse an array with fewer axes than its layout, such as `[..., T, n]`, names.

    Raises:
      ValueError: it has fewer than `least`.
    """
    if array is not None and array.ndim < least:
        raise ValueError(
            f"{operation}: {name} has shape {array.shape}, expected {layout}: "
            f"at least {least} {'axis' if least == 1 else 'axes'}"
        )


def broadcast(operation: str, **batches: tuple[int, ...]) -> tuple[int, ...]:
    """The common shape of the leading axes.

    Raises:
      ValueError: there is none; with the names and the shapes.
    """
    try:
        return jnp.broadcast_shapes(*batches.values())
    except ValueError:
        each = ", ".join(f"{name} {shape}" for name, shape in batches.items())
        raise ValueError(
            f"{operation}: leading axes do not broadcast: {each}; make them equal, or 1"
        ) from None


def check_integer(operation: str, name: str, value: Any, least: int) -> None:
    """Refuse a static number that is not an integer, or is below a bound.

    Raises:
      ValueError: with its name, value and range.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{operation}: {name}={value!r} must be an integer, at least {least}")


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
