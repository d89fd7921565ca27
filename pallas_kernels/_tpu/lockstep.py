"""One function of several sequences, with their instructions interleaved.

A kernel's instructions are scheduled not far from where they are written. A product of two small
matrices occupies one of a core's matrix units, and the next product of the same sequence waits for
it. With the products of several sequences written in turn, all units have work.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Calls that are written out: where the primitive keeps its body.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}
_CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


class Window(NamedTuple):
    """A part of a kernel's memory, read anew at every use, so that no register holds it between."""

    ref: Any
    index: Any

    def load(self):
        """The array."""
        return self.ref[self.index]

    def store(self, value) -> None:
        """Write the array."""
        self.ref[self.index] = value


def lockstep(
    function: Callable[..., Any],
    shapes: tuple,
    arguments: list[list[Any]],
    kept: list[list[Window | None]] | None = None,
) -> list[Any]:
    """`[function(*a) for a in arguments]`, traced once, its equations emitted in turn.

    Args:
      function: takes trees of arrays, and closes over none.
      shapes: of its arguments.
      arguments: for each sequence a window or an array for every leaf.
      kept: for each sequence and each leaf of the result a window, or None. The leaf is written
        there as soon as it is computed, and read from there where it is used. No argument may
        overlap with it.
    """
    closed, tree = _flat(function, shapes)
    variables = closed.jaxpr.outvars
    kept = [[None] * len(variables)] * len(arguments) if kept is None else kept
    early: list[dict] = [{} for _ in arguments]
    for windows, at in zip(early, kept, strict=True):
        for var, window in zip(variables, at, strict=True):
            if window is not None and not isinstance(var, Literal):
                windows.setdefault(var, window)
    results = _run(closed, arguments, early)
    made = {var for equation in closed.jaxpr.eqns for var in equation.outvars}
    for windows, at, values in zip(early, kept, results, strict=True):
        for var, window, value in zip(variables, at, values, strict=True):
            done = not isinstance(var, Literal) and var in made and windows.get(var) is window
            if window is not None and not done:
                window.store(value_of(value))
    return [jax.tree.unflatten(tree, values) for values in results]


def value_of(value):
    """The array itself, or the array in a window."""
    return value.load() if isinstance(value, Window) else value


def _flat(function, shapes):
    """The function as equations without nested calls, and the tree of its results."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*shapes)
    leaves = jax.tree.leaves(shapes)
    return jax.make_jaxpr(lambda *values: _opened(closed, values))(*leaves), jax.tree.structure(
        shape
    )


def _opened(closed: ClosedJaxpr, given) -> list[Any]:
    """The results, with every nested call inlined."""
    jaxpr = closed.jaxpr
    known = dict(zip([*jaxpr.invars, *jaxpr.constvars], [*given, *closed.consts], strict=True))
    for equation in jaxpr.eqns:
        inputs = _read(known, equation.invars)
        body = equation.params.get(_CALLS.get(equation.primitive.name))
        if body is None:
            outs = equation.primitive.bind(*inputs, **equation.params)
            outs = outs if equation.primitive.multiple_results else [outs]
        else:
            outs = _opened(ClosedJaxpr(body, []) if isinstance(body, Jaxpr) else body, inputs)
        known.update(zip(equation.outvars, outs, strict=True))
    return _read(known, jaxpr.outvars)


def _run(closed: ClosedJaxpr, given: list[list[Any]], early: list[dict]) -> list[list[Any]]:
    """The results of each sequence: arrays, or the windows that they were written to."""
    jaxpr = closed.jaxpr
    known: list[dict] = []
    for values in given:
        known.append(dict(zip(jaxpr.invars, values, strict=True)))
        known[-1].update(zip(jaxpr.constvars, closed.consts, strict=True))
    for equation in jaxpr.eqns:
        for here, windows in zip(known, early, strict=True):
            inputs = map(value_of, _read(here, equation.invars))
            outs = equation.primitive.bind(*inputs, **equation.params)
            outs = outs if equation.primitive.multiple_results else [outs]
            for var, out in zip(equation.outvars, outs, strict=True):
                here[var] = windows.get(var, out)
                if var in windows:
                    windows[var].store(out)
    return [_read(here, jaxpr.outvars) for here in known]


def _read(values: dict, variables) -> list[Any]:
    return [v.val if isinstance(v, Literal) else values[v] for v in variables]
