"""The gated delta rule against flash-linear-attention's, on one GPU in one run.

    nestedjax bench kernels --against fla

Both get the same numbers in bfloat16, each in its own layout: batch 8, 16 heads of 128, 4,096 and
16,384 tokens, forward and backward. Theirs is timed by CUDA events, ours by the host's clock
around as many calls, which the device runs one after another. `ratio` is their time over ours.
"""

import importlib.util
import os
import time
from collections.abc import Sequence
from typing import Any

from nestedjax.errors import ConfigError

LENGTHS = (4096, 16384)
_NEEDED = {"torch": "torch", "fla": "flash-linear-attention"}  # module, package


def measure(
    *, lengths: Sequence[int] = LENGTHS, batch: int = 8, heads: int = 16, d: int = 128, repeats: int
) -> list[dict[str, Any]]:
    """Two rows for each length, "fla" and "pallas_gpu".

    Args:
      lengths: tokens.
      batch: sequences.
      heads: of each sequence.
      d: features of keys and values.
      repeats: timed calls of forward + backward, after two that compile and warm up.

    Returns:
      Rows as those of `kernels.measure`, with `ratio`, their time over ours, and `difference`, the
      largest between the two reads, in units of the largest read.

    Raises:
      ConfigError: without a GPU or the packages, saying what to install.
    """
    _check()
    return [row for n in lengths for row in _pair(n, batch, heads, d, repeats)]


def _check():
    # torch is to find memory beside JAX
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    missing = [name for name, _ in _NEEDED.items() if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(_NEEDED[name] for name in missing)
        raise ConfigError(f"--against fla needs {packages}: pip install {packages}")
    import jax

    platform = jax.devices()[0].platform
    if platform != "gpu":
        raise ConfigError(f"--against fla needs a GPU, this device is a {platform}")


def _pair(length, batch, heads, d, repeats):
    import jax

    from nestedjax.benchmarks import kernels

    workload = kernels.gated_delta_rule(f"L{length} d{d} gated", batch, heads, length, d)
    arrays = jax.jit(workload.make)(jax.random.key(0))
    theirs, their_reads = _theirs(arrays, repeats)
    ours, our_reads = _ours(workload, arrays, repeats)
    largest = float(abs(their_reads).max())
    difference = float(abs(our_reads - their_reads).max()) / largest
    common = {
        "op": workload.op,
        "workload": workload.name,
        "direction": "forward+backward",
        "device": jax.devices()[0].device_kind,
        "difference": difference,
    }
    return [
        {
            **common,
            "implementation": name,
            "milliseconds": 1e3 * seconds,
            "flops_per_second": 3 * workload.flops / seconds,
            "ratio": theirs / seconds,
        }
        for name, seconds in (("fla", theirs), ("pallas_gpu", ours))
    ]


def _ours(workload, arrays, repeats):
    """Seconds of a forward and backward pass, and the reads [B, H, T, d] in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def total(arrays):
        reads = workload.call(arrays, "pallas_gpu").reads
        return jnp.sum(reads.astype(jnp.float32)), reads

    step = jax.jit(jax.grad(total, has_aux=True)).lower(arrays).compile()
    for _ in range(2):
        _, reads = jax.block_until_ready(step(arrays))
    started = time.perf_counter()
    for _ in range(repeats):
        out = step(arrays)
    jax.block_until_ready(out)
    return (time.perf_counter() - started) / repeats, np.asarray(reads.astype(jnp.float32))


def _theirs(arrays, repeats):
    """The same of flash-linear-attention."""
    import numpy as np
    import torch
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def given(name, dtype):  # tokens before heads
        array = torch.from_numpy(np.array(arrays[name].astype(np.float32))).to("cuda", dtype)
        return array.transpose(1, 2).contiguous().requires_grad_()

    keys, values, queries = (given(n, torch.bfloat16) for n in ("keys", "values", "queries"))
    learning_rate, decay = (given(n, torch.float32) for n in ("learning_rate", "decay"))
    leaves = (keys, values, queries, learning_rate, decay)

    def step():
        reads, _ = chunk_gated_delta_rule(
            queries, keys, values, decay.log(), learning_rate, scale=1.0
        )
        torch.autograd.grad(reads.float().sum(), leaves)
        return reads

    for _ in range(2):
        reads = step()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started.record()
    for _ in range(repeats):
        step()
    ended.record()
    torch.cuda.synchronize()
    seconds = 1e-3 * started.elapsed_time(ended) / repeats
    return seconds, reads.detach().transpose(1, 2).float().cpu().numpy()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for a terminal."""
    lines = [
        f"{'workload':22}{'implementation':15}{'ms':>10}{'TFLOP/s':>9}{'ratio':>7}{'apart':>9}"
    ]
    for row in rows:
        lines.append(
            f"{row['workload']:22}{row['implementation']:15}{row['milliseconds']:>10.2f}"
            f"{row['flops_per_second'] / 1e12:>9.1f}{row['ratio']:>7.2f}{row['difference']:>9.1e}"
        )
    return "\n".join(lines)
