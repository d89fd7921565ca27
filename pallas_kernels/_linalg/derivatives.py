"""Functions with a hand-written derivative, in forward and in reverse mode.

`jax.custom_vjp` refuses forward mode, and the tangents of `jax.custom_jvp` are transposed by JAX,
in layouts that cost copies and with residuals of JAX's choice. Here the tangent is a linear map
that brings its own transpose: forward mode evaluates the map, reverse mode the transpose.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_linear_p = Primitive("linear_map")
_linear_p.multiple_results = True


def differentiable(
    function: Callable[..., Any],
    forward: Callable[..., Any],
    tangent: Callable[..., Any],
    transpose: Callable[..., Any],
    *,
    static: int = 0,
) -> Callable[..., Any]:
    """`function(*arrays, *options)` with the derivative given; vmaps and derivatives of any order.

    Args:
      function: takes trees of floating-point arrays, then `static` hashable options.
      forward: takes the same; `-> (outputs, kept)`, `kept` a tree of what the derivative needs.
      tangent: `tangent(*options, kept, tangents) -> tangents of the outputs`, linear in `tangents`,
        a tuple with one tree for each of the arrays.
      transpose: `transpose(*options, kept, cotangents) -> cotangents of the arrays`, a tuple: the
        transpose of `tangent`.
      static: how many options there are.
    """

    def call(*given):
        arrays, options = given[: len(given) - static], given[len(given) - static :]

        @jax.custom_jvp
        def plain(*arrays):
            return function(*arrays, *options)

        @plain.defjvp
        def derivative(primals, tangents):
            outputs, kept = forward(*primals, *options)
            maps = partial(tangent, *options), partial(transpose, *options)
            return outputs, _linear(*maps, kept, tuple(tangents), outputs)

        return plain(*arrays)

    return call


def reverse_only(given: Any, operation: str) -> Any:
    """`given`, a tree of what a kernel reads; forward mode is refused with what to do instead.

    Raises:
      NotImplementedError: in forward mode (`jax.jvp`, `jax.jacfwd`, `jax.hessian`).
    """
    advice = (
        f"{operation} is a kernel, whose derivative is for reverse mode only: for forward mode "
        "(jax.jvp, jax.jacfwd, jax.hessian) use implementation='xla'"
    )

    def refuse(kept, tangents):
        raise NotImplementedError(advice)

    @jax.custom_jvp
    def same(a):
        return a

    @same.defjvp
    def derivative(primals, tangents):
        (a,), again = primals, same(*primals)  # refuses the next derivative as well
        nothing = jax.lax.slice(a.reshape(-1), (0,), (0,))
        maps = refuse, lambda kept, g: (g,)
        return again, _linear(*maps, nothing, tuple(tangents), again, forward=False)

    return jax.tree.map(
        lambda a: same(a) if jax.numpy.issubdtype(a.dtype, jax.numpy.floating) else a, given
    )


def _linear(function, transpose, kept, tangents, like, *, forward=True):
    """`function(kept, tangents)`, whose outputs have the types of `like`.

    With `forward=False` it raises, which a vmap of the tangents alone (`jax.jacfwd`) does at once.
    """
    leaves, tree = jax.tree.flatten(kept)
    inputs, of_inputs = jax.tree.flatten(tangents)
    outs, of_outs = jax.tree.flatten(like)

    def flat_function(*given):
        kept, tangents = given[: len(leaves)], given[len(leaves) :]
        found = function(jax.tree.unflatten(tree, kept), jax.tree.unflatten(of_inputs, tangents))
        return jax.tree.leaves(found)

    def flat_transpose(*given):
        kept, outs = given[: len(leaves)], given[len(leaves) :]
        found = transpose(jax.tree.unflatten(tree, kept), jax.tree.unflatten(of_outs, outs))
        return jax.tree.leaves(found)

    found = _linear_p.bind(
        *leaves,
        *inputs,
        function=flat_function,
        transpose=flat_transpose,
        kept=len(leaves),
        outs=tuple(map(jax.typeof, outs)),
        forward=forward,
    )
    return jax.tree.unflatten(of_outs, found)


@_linear_p.def_impl
def _run(*given, function, **_):
    return function(*given)


@_linear_p.def_abstract_eval
def _types(*given, outs, **_):
    return outs


def _jvp(primals, tangents, *, function, **options):
    # Of second order: what the change of `kept` adds is left to JAX's own rules.
    moved = [ad.instantiate_zeros(tangent) for tangent in tangents]
    _, found = jax.jvp(lambda *x: tuple(function(*x)), tuple(primals), tuple(moved))
    return _linear_p.bind(*primals, function=function, **options), list(found)


def _transposed(cotangents, *given, transpose, kept, **_):
    found = transpose(*given[:kept], *map(ad.instantiate_zeros, cotangents))
    return [None] * kept + list(found)


def _batched(data, given, axes, *, function, transpose, kept, outs, forward):
    """Inputs and outputs of the map have the mapped axis in front; `kept` has it where it comes."""
    if all(axis is None for axis in axes):
        options = dict(function=function, transpose=transpose, kept=kept, outs=outs)
        return _linear_p.bind(*given, **options, forward=forward), [None] * len(outs)
    if not forward and all(axis is None for axis in axes[:kept]):
        function(*given)  # raises
    over = partial(jax.vmap, axis_size=data.size, spmd_axis_name=data.spmd_name)
    inputs = [
        over(lambda a: a, in_axes=axis)(array)
        for array, axis in zip(given[kept:], axes[kept:], strict=True)
    ]
    found = _linear_p.bind(
        *given[:kept],
        *inputs,
        function=over(function, in_axes=(*axes[:kept], *[0] * len(inputs))),
        transpose=over(transpose, in_axes=(*axes[:kept], *[0] * len(outs))),
        kept=kept,
        outs=tuple(_mapped(aval, data) for aval in outs),
        forward=forward,
    )
    return found, [0] * len(outs)


def _mapped(aval, data):
    """The type with the mapped axis in front."""
    spec = jax.sharding.PartitionSpec(data.explicit_mesh_axis, *aval.sharding.spec)
    sharding = jax.sharding.NamedSharding(aval.sharding.mesh, spec)
    return aval.update(shape=(data.size, *aval.shape), sharding=sharding)


ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transposed
batching.fancy_primitive_batchers[_linear_p] = _batched
mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))
