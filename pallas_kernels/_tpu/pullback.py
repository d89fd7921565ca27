"""The pullback of a function with its residuals as a list, so that a kernel can store them itself.

`jax.vjp` gives a closure. Here what it closes over is a list of arrays of known shapes, without the
arguments of the function, which a kernel still has.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

# Primitives that only move numbers, or make them from none.
_MOVES = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "iota", "copy", "slice"}
_MOVES |= {"concatenate", "split"}
_MOVES |= {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "shift_right_arithmetic"}
# Primitives that are cheap enough to run again where their operands are at hand.
_ELEMENTWISE = {"neg", "mul", "add", "sub", "max", "min", "select_n", "convert_element_type"}
_ELEMENTWISE |= {"add_any", "integer_pow", "square"}


class Pullback(NamedTuple):
    """The pullback of a function that returns `(carried, others)`, in two parts.

    Attributes:
      run: `run(*arguments) -> (carried, kept)`, forward; `kept` is the list of residuals.
      back: `back(arguments, kept, cotangents) -> cotangents of the arguments`.
      kept: shapes of the residuals; floating-point arrays of rank two or more.
    """

    run: Callable[..., tuple[Any, list[Any]]]
    back: Callable[[Any, list[Any], Any], Any]
    kept: list[jax.ShapeDtypeStruct]


def split_pullback(function: Callable[..., Any], arguments: tuple) -> Pullback:
    """The pullback of `function(*arguments)`; the arguments are given as shapes.

    Raises:
      NotImplementedError: a residual is of booleans or integers, or a scalar or vector: a kernel
        has no array in VMEM for it.
    """
    trees: dict[str, Any] = {}

    def traced(*arguments):
        (carried, _), pull = jax.vjp(function, *arguments)
        leaves, trees["pull"] = jax.tree.flatten(pull)
        leaves_of_carried, trees["carried"] = jax.tree.flatten(carried)
        return leaves_of_carried, leaves

    closed = jax.make_jaxpr(traced)(*arguments)
    jaxpr, count = closed.jaxpr, trees["carried"].num_leaves
    needed = jaxpr.outvars[count:]
    kept = _sources(jaxpr, needed)
    jaxpr = jaxpr.replace(outvars=[*jaxpr.outvars[:count], *kept])
    run = jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))
    shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in kept]
    for shape in shapes:
        if not jnp.issubdtype(shape.dtype, jnp.floating) or len(shape.shape) < 2:
            raise NotImplementedError(f"the pullback keeps {shape}")

    def forward(*arguments):
        outs = run(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(trees["carried"], outs[:count]), list(outs[count:])

    def back(arguments, values, cotangents):
        known = dict(zip(jaxpr.invars, jax.tree.leaves(arguments), strict=True))
        known |= dict(zip(kept, values, strict=True))
        leaves = _made(closed.jaxpr, needed, known)
        return jax.tree.unflatten(trees["pull"], leaves)(cotangents)

    return Pullback(forward, back, shapes)


def _makers(jaxpr):
    """For each variable that may be computed again, the equation that does it."""
    names = _MOVES | _ELEMENTWISE
    return {e.outvars[0]: e for e in jaxpr.eqns if e.primitive.name in names}


def _size(var) -> int:
    return math.prod(var.aval.shape)


def _sources(jaxpr, needed) -> list[Any]:
    """What to keep, so that everything needed can be computed from it and the arguments.

    In the order of the program: a value is computed again if that takes, besides what is kept
    already, only arrays that are far smaller than itself; otherwise it is kept.
    """
    makers, order = _makers(jaxpr), dict[Any, int]()
    for i, equation in enumerate(jaxpr.eqns):
        order |= dict.fromkeys(equation.outvars, i)
    given = set(jaxpr.invars)
    found: dict[Any, None] = {}
    wanted = [var for var in needed if not isinstance(var, Literal) and var not in given]
    for var in sorted(dict.fromkeys(wanted), key=order.__getitem__):
        new = _leaves(var, makers, given | found.keys())
        large = sum(map(_size, new)) * 8 > _size(var)
        moved = var in makers and makers[var].primitive.name in _MOVES
        if (large and not moved) or sum(map(_size, new)) >= _size(var):
            new = {var: None} if _keepable(var) else new
        found |= new
    return list(found)


def _keepable(var) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.floating) and len(var.aval.shape) > 1


def _leaves(var, makers, ready) -> dict[Any, None]:
    """What a variable is computed from, going back as far as equations may run again."""
    found: dict[Any, None] = {}
    todo, seen = [var], set()
    while todo:
        var = todo.pop()
        if isinstance(var, Literal) or var in ready or var in seen:
            continue
        seen.add(var)
        if var in makers:
            todo.extend(makers[var].invars)
        else:
            found[var] = None
    return found


def _made(jaxpr, needed, known: dict[Any, Any]) -> list[Any]:
    makers = _makers(jaxpr)

    def make(var):
        if isinstance(var, Literal):
            return var.val
        if var not in known:
            equation = makers[var]
            known[var] = equation.primitive.bind(*map(make, equation.invars), **equation.params)
        return known[var]

    return [make(var) for var in needed]
