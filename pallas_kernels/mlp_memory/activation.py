"""GELU with derivatives written by hand: what autodiff keeps would fill a kernel's memory."""

import math

import jax.numpy as jnp

from pallas_kernels._linalg.derivatives import differentiable

_BEND, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def _gelu(z):
    """GELU in the tanh form, its slope and its curvature; what is unused is never computed."""
    squared = z * z
    bent = jnp.tanh(z * (_BEND + _BEND * _CUBIC * squared))
    inside = _BEND + 3.0 * _BEND * _CUBIC * squared
    share, steep = 0.5 + 0.5 * bent, 0.5 - 0.5 * bent * bent
    turn = steep * inside
    bending = 6.0 * _BEND * _CUBIC * z - 2.0 * bent * inside * inside  # of the slope of tanh
    curvature = 2.0 * turn + z * steep * bending
    return z * share, share + z * turn, curvature


def activation(z):
    """GELU, as the paper leaves sigma open; in the tanh form, whose slope is cheap."""
    return _activation(z)


def activation_and_slope(z):
    """GELU and its derivative from one tanh."""
    return _activation_and_slope(z)


def _activation_and_slope_forward(z):
    value, slope, curvature = _gelu(z)
    return (value, slope), (slope, curvature)


_activation = differentiable(
    lambda z: _gelu(z)[0],
    lambda z: _gelu(z)[:2],
    lambda slope, tangents: tangents[0] * slope,
    lambda slope, g: (g * slope,),
)
_activation_and_slope = differentiable(
    lambda z: _gelu(z)[:2],
    _activation_and_slope_forward,
    lambda kept, tangents: (tangents[0] * kept[0], tangents[0] * kept[1]),
    lambda kept, g: (g[0] * kept[0] + g[1] * kept[1],),
)
