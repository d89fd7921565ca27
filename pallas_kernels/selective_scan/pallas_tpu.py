"""The selective scan as one TPU kernel each way: the state stays in VMEM over all chunks.

The channels fill whole registers of 8 x 128 and the N numbers of a token's `write` and `read` are
scalars, so that a token costs products of registers with registers and scalars and no movement
inside a register. The forward kernel leaves the state of every chunk's start in memory; the
backward kernel runs a chunk again from there, keeps its states in VMEM, and goes back.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels._tpu.vmem import MIB, vmem_limit_of

_LANES, _ROWS = 128, 8


class _Options(NamedTuple):
    chunk: int
    rows: int
    vmem_limit: int
    interpret: bool


def selective_scan_pallas_tpu(
    x: Float[Array, "*b T D"],
    step: Float[Array, "*b T D"],
    decay: Float[Array, "D N"],
    write: Float[Array, "*b T N"],
    read: Float[Array, "*b T N"],
    initial: Float[Array, "*b D N"],
    *,
    chunk_size: int,
    vmem_limit: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "*b T D"], Float[Array, "*b D N"]]:
    """As the reference; lengths and channels are padded with zeros, which change nothing.

    Args:
      chunk_size: tokens between two stored states; a chunk's states are in VMEM going back.
      vmem_limit: bytes of VMEM the kernels may use; None: of this process's first device.
      interpret: run on the CPU, for tests.

    Raises:
      NotImplementedError: numbers of 64 bits, or a chunk whose states do not fit in VMEM.
    """
    if x.dtype != jnp.float32:
        raise NotImplementedError(f"the TPU kernel keeps its state in float32, not {x.dtype}")
    lead, (length, channels), states = x.shape[:-2], x.shape[-2:], decay.shape[-1]
    size = min(chunk_size, max(length, 1))
    chunks = -(-length // size)
    tiles = -(-channels // _LANES)
    rows = min(tiles, _ROWS)
    tiles = -(-tiles // rows) * rows
    vmem_limit = vmem_limit_of() if vmem_limit is None else vmem_limit
    needed = vmem_bytes(size, states)
    if needed > vmem_limit:
        raise NotImplementedError(
            f"a chunk of {size} tokens with {states} states needs {needed / MIB:.1f} MiB of VMEM, "
            f"more than the limit of {vmem_limit / MIB:.1f} MiB; use a smaller chunk_size, or 'xla'"
        )
    if not length or not x.size:
        return jnp.zeros_like(x), initial

    def tiled(a):
        """Channels, the last axis, as [tiles, 128]."""
        fill = [(0, 0)] * (a.ndim - 1) + [(0, tiles * _LANES - channels)]
        return jnp.pad(a, fill).reshape(*a.shape[:-1], tiles, _LANES)

    def tokens(a):
        a = a.reshape(-1, *a.shape[len(lead) :])
        return jnp.pad(a, [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (a.ndim - 2))

    def scalars(a):
        return tokens(a).reshape(-1, chunks, 1, size * states)

    start = tiled(initial.mT).reshape(-1, states, tiles, _LANES)
    operands = (tokens(tiled(x)), tokens(tiled(step)), scalars(write), scalars(read))
    options = _Options(size, rows, vmem_limit, interpret)
    y, final = _scan(options, *operands, tiled(decay.mT), start)
    y = y.reshape(*y.shape[:2], -1)[:, :length, :channels].reshape(x.shape)
    final = final.reshape(*lead, states, -1)[..., :channels].mT
    return y, final


def vmem_bytes(chunk: int, states: int) -> int:
    """VMEM of the backward kernel: tokens and partial sums twice, states of a chunk once."""
    tile = 4 * _ROWS * _LANES
    partial_sums = 4 * chunk * states * _LANES
    return 2 * (5 * chunk * tile + 2 * partial_sums + 5 * states * tile) + chunk * states * tile


def _forward_kernel(x, step, write, read, decay, first, y, final, *rest, states, chunk, keep):
    *starts, held = rest
    at = pl.program_id(2)

    @pl.when(at == 0)
    def _():
        held[...] = first[0]

    if keep:
        starts[0][0, 0] = held[...]

    def token(t, _):
        dt, given = step[0, t], step[0, t] * x[0, t]
        total = jnp.zeros_like(dt)
        for n in range(states):
            scalar = t * states + n
            h = jnp.exp(dt * decay[n]) * held[n] + write[0, 0, 0, scalar] * given
            held[n] = h
            total = total + read[0, 0, 0, scalar] * h
        y[0, t] = total

    jax.lax.fori_loop(0, chunk, token, None)

    @pl.when(at == pl.num_programs(2) - 1)
    def _():
        final[0] = held[...]


def _backward_kernel(*refs, states, chunk):
    """Of each chunk, from the last: `before[t]` is the state before token t."""
    x, step, write, read, decay, starts, of_final, of_y, *made = refs
    of_x, of_step, of_write, of_read, of_decay, of_first, before, held = made
    at = pl.program_id(2)

    @pl.when(at == 0)
    def _():
        held[...] = of_final[0]
        of_decay[...] = jnp.zeros_like(of_decay)

    before[0] = starts[0, 0]

    def again(t, _):
        dt, given = step[0, t], step[0, t] * x[0, t]
        for n in range(states):
            written = write[0, 0, 0, t * states + n] * given
            before[t + 1, n] = jnp.exp(dt * decay[n]) * before[t, n] + written

    jax.lax.fori_loop(0, chunk - 1, again, None)

    def back(i, _):
        t = chunk - 1 - i
        dt, token, g = step[0, t], x[0, t], of_y[0, t]
        given = dt * token
        of_given, of_dt = jnp.zeros_like(dt), jnp.zeros_like(dt)
        for n in range(states):
            scalar = t * states + n
            kept = jnp.exp(dt * decay[n])
            decayed = kept * before[t, n]
            h = decayed + write[0, 0, 0, scalar] * given
            of_h = held[n] + read[0, 0, 0, scalar] * g
            row = pl.ds(scalar, 1)
            of_read[0, 0, 0, row] = jnp.sum(g * h, axis=0, keepdims=True)
            of_write[0, 0, 0, row] = jnp.sum(of_h * given, axis=0, keepdims=True)
            of_given = of_given + write[0, 0, 0, scalar] * of_h
            of_exponent = of_h * decayed
            of_dt = of_dt + of_exponent * decay[n]
            of_decay[0, n] = of_decay[0, n] + of_exponent * dt
            held[n] = of_h * kept
        of_x[0, t] = of_given * dt
        of_step[0, t] = of_dt + of_given * token

    jax.lax.fori_loop(0, chunk, back, None)

    @pl.when(at == pl.num_programs(2) - 1)
    def _():
        of_first[0] = held[...]


def _specs(options, states, order):
    """Blocks of tokens, scalars, the decay, a state, and the states of chunk starts."""
    chunk, rows = options.chunk, options.rows
    return {
        "tokens": pl.BlockSpec((1, chunk, rows, _LANES), lambda b, r, c: (b, order(c), r, 0)),
        "scalars": pl.BlockSpec(
            (1, 1, 1, chunk * states),
            lambda b, r, c: (b, order(c), 0, 0),
            memory_space=pltpu.SMEM,
        ),
        "decay": pl.BlockSpec((states, rows, _LANES), lambda b, r, c: (0, r, 0)),
        "state": pl.BlockSpec((1, states, rows, _LANES), lambda b, r, c: (b, 0, r, 0)),
        "starts": pl.BlockSpec(
            (1, 1, states, rows, _LANES), lambda b, r, c: (b, order(c), 0, r, 0)
        ),
        "sums": pl.BlockSpec(
            (1, 1, 1, chunk * states, _LANES), lambda b, r, c: (b, r, order(c), 0, 0)
        ),
    }


def _call(kernel, options, operands, given, made, shapes, scratch, order, name):
    x, states = operands[0], operands[4].shape[0]
    specs = _specs(options, states, order)
    grid = (x.shape[0], x.shape[2] // options.rows, x.shape[1] // options.chunk)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[specs[n] for n in given],
        out_specs=[specs[n] for n in made],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        scratch_shapes=[pltpu.VMEM((*n, options.rows, _LANES), jnp.float32) for n in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=options.vmem_limit,
        ),
        interpret=options.interpret,
        name=name,
    )(*operands)


_GIVEN = ("tokens", "tokens", "scalars", "scalars", "decay")


def _forward(options, operands, *, keep):
    x, states, first = operands[0], operands[4].shape[0], operands[5]
    made, shapes = ["tokens", "state"], [x.shape, first.shape]
    if keep:
        made.append("starts")
        shapes.append((x.shape[0], x.shape[1] // options.chunk, *first.shape[1:]))
    return _call(
        partial(_forward_kernel, states=states, chunk=options.chunk, keep=keep),
        options,
        operands,
        (*_GIVEN, "state"),
        made,
        shapes,
        [(states,)],
        lambda c: c,
        "selective_scan_forward",
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, *operands):
    y, final = _forward(options, operands, keep=False)
    return y, final


def _scan_fwd(options, *operands):
    y, final, starts = _forward(options, operands, keep=True)
    return (y, final), (operands[:5], starts)


def _scan_bwd(options, residuals, cotangents):
    (x, step, write, read, decay), starts = residuals
    of_y, of_final = cotangents
    states, chunks = decay.shape[0], starts.shape[1]
    sums = (x.shape[0], x.shape[2] // options.rows, chunks, options.chunk * states, _LANES)
    state = of_final.shape
    of_x, of_step, of_write, of_read, of_decay, of_first = _call(
        partial(_backward_kernel, states=states, chunk=options.chunk),
        options,
        (x, step, write, read, decay, starts, of_final, of_y),
        (*_GIVEN, "starts", "state", "tokens"),
        ("tokens", "tokens", "sums", "sums", "state", "state"),
        (x.shape, x.shape, sums, sums, state, state),
        [(options.chunk, states), (states,)],
        lambda c: chunks - 1 - c,
        "selective_scan_backward",
    )
    of_write, of_read = (jnp.sum(a, axis=(1, 4))[:, :, None] for a in (of_write, of_read))
    return of_x, of_step, of_write, of_read, jnp.sum(of_decay, axis=0), of_first


_scan.defvjp(_scan_fwd, _scan_bwd)
