"""How much the kernels of a chunk loop do in one step, by what VMEM holds; see `chunk_loop`."""

from typing import Any, NamedTuple

import jax

from pallas_kernels._tpu.chunk_loop import Chunk, Options, arguments_of_one
from pallas_kernels._tpu.pullback import split_pullback
from pallas_kernels._tpu.vmem import MIB, MOST, least_every, padded_bytes, save_every

# Values between the products of a chunk, in what its pullback keeps: as the compiler asked for.
_BETWEEN = 1.25


class _Bytes(NamedTuple):
    """Bytes of VMEM: of constants and state of a sequence, of tokens and results of a chunk."""

    constants: int
    state: int
    tokens: int
    outputs: int
    kept: int

    def forward(self, every: int) -> float:
        """Of the forward kernel; resident blocks are single-buffered, streamed ones double."""
        moving = 2 * every * (self.tokens + self.outputs)
        return self.constants + 5 * self.state + moving + _BETWEEN * self.kept

    def backward(self, every: int, kept: bool) -> float:
        """Of the backward kernel, which keeps residuals of `every` chunks, or only their starts."""
        moving = 2 * every * (2 * self.tokens + self.outputs)
        inside = every * self.state + (every * self.kept if kept else 0)
        return 3 * self.constants + 6 * self.state + moving + inside + _BETWEEN * self.kept


def _of(tree, lead: int) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(padded_bytes(a.shape[lead:], a.dtype.itemsize) for a in leaves)


def plan(
    chunk: Chunk,
    constants: Any,
    state: Any,
    tokens: Any,
    *,
    name: str,
    vmem_limit: int,
    abreast: int,
    every: int | None = None,
    sequences: int | None = None,
    interpret: bool = False,
) -> Options:
    """Choose how the kernels of `chunk_loop(chunk, ..., constants, state, tokens)` are compiled.

    With more chunks between two stored states, these take less HBM, but the residuals of all those
    chunks have to fit in VMEM. The plan keeps residuals if it finds a number of chunks for which
    they fit while the stored states take at most `vmem.STORED` bytes of HBM. If there is none, it
    keeps only the chunks' starts.

    Args:
      chunk, constants, state, tokens: see `chunk_loop`.
      name: of the kernels.
      vmem_limit: bytes.
      abreast: how many sequences in one step fill the matrix units; fewer where VMEM is short.
      every: chunks between two stored states; None to choose.
      sequences: how many a step takes; None to choose.
      interpret: run on the CPU, for tests.
    """
    shapes = arguments_of_one(constants, state, tokens)
    outputs = jax.eval_shape(chunk, *shapes)[1]
    kept = sum(padded_bytes(a.shape, a.dtype.itemsize) for a in split_pullback(chunk, shapes).kept)
    fixed, held, given = (_of(tree, 1) for tree in shapes)
    sizes = _Bytes(fixed, held, given, _of(outputs, 1), kept)
    count, chunks = jax.tree.leaves(tokens)[0].shape[:2]
    steps = [k for k in (4, 2, 1) if k <= abreast] if sequences is None else [sequences]
    everies = [k for k in range(MOST, 0, -1) if chunks % k == 0 and k >= least_every(state, chunks)]
    everies = everies if every is None else [every]
    fitting = (
        (step, k)
        for step in steps
        for k in everies
        if step * sizes.backward(k, True) <= vmem_limit or sequences is not None
    )
    back, chosen = next(fitting, (1, None))
    residuals = chosen is not None
    if chosen is None:
        spare = (vmem_limit - 12 * MIB) // 8
        chosen = save_every(state, chunks, spare) if every is None else every
    ahead = next((k for k in steps if k * sizes.forward(chosen) <= vmem_limit), steps[-1])
    return Options(vmem_limit, interpret, name, chosen, (ahead, back), residuals)
