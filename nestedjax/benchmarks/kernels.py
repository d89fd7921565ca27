"""Time, rates and memory of every kernel operation, workload and implementation on this device.

Rows are of the implementations that run here; those that do not say why and have no time. Rates
count the products of the token recurrence (not of the chunked form, which makes more) and the bytes
of operands and results; a backward pass counts twice the forward one. An accelerator's time is its
profiler's, and `roofline` the least time it could take as a fraction of that.

    nestedjax bench kernels --ops delta_rule
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pallas_kernels.workloads import PRESETS

DELTA_RULE = MLP_MEMORY = ("reference", "xla", "pallas_tpu", "pallas_gpu")


class Workload(NamedTuple):
    """One call of an operation.

    Attributes:
      op: the operation's name in `pallas_kernels`.
      name: of the workload.
      make: `make(key) -> arrays`, the differentiated operands.
      call: `call(arrays, implementation) -> tree of arrays`.
      flops: of the recurrence, forward.
      implementations: all that the operation has.
    """

    op: str
    name: str
    make: Callable[[Any], Any]
    call: Callable[[Any, str], Any]
    flops: float
    implementations: tuple[str, ...]


def _delta_rule(name: str, batch: int, heads: int, length: int, d: int, chunk: int) -> Workload:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.delta_rule import delta_rule

    def make(key):
        keys = jax.random.split(key, 6)
        lead = (batch, heads, length)
        x, error, queries = (jax.random.normal(k, (*lead, d)) for k in keys[:3])
        learning_rate, decay, momentum = (
            jax.nn.sigmoid(jax.random.normal(k, lead)) for k in keys[3:]
        )
        x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        return dict(
            x=x,
            error=error / d**0.5,
            queries=queries,
            learning_rate=learning_rate,
            decay=0.9 + 0.1 * decay,
            erase=learning_rate,
            momentum=0.5 * momentum,
            initial=jnp.zeros((batch, heads, d, d)),
        )

    def call(arrays, implementation):
        return delta_rule(**arrays, chunk_size=chunk, implementation=implementation)

    # W x, its erasure, the write, S, the read: five of d x d
    flops = 10.0 * batch * heads * length * d * d
    return Workload("delta_rule", name, make, call, flops, DELTA_RULE)


def gated_delta_rule(name: str, batch: int, heads: int, length: int, d: int) -> Workload:
    """Gated DeltaNet's recurrence with bfloat16 tokens, which all kernels take; chunks of 64."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.delta_rule import delta_rule

    def make(key):
        keys = jax.random.split(key, 5)
        lead = (batch, heads, length)
        x, values, queries = (jax.random.normal(k, (*lead, d)) for k in keys[:3])
        x, queries = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (x, queries))
        tokens = dict(keys=x, values=values, queries=queries)
        tokens = {name: array.astype(jnp.bfloat16) for name, array in tokens.items()}
        learning_rate, decay = (jax.nn.sigmoid(jax.random.normal(k, lead)) for k in keys[3:])
        return dict(**tokens, learning_rate=learning_rate, decay=0.9 + 0.1 * decay)

    def call(arrays, implementation):
        learning_rate, decay = arrays["learning_rate"], arrays["decay"]
        return delta_rule(
            arrays["keys"],
            -arrays["values"],
            learning_rate,
            decay=decay,
            erase=decay * learning_rate,
            queries=arrays["queries"],
            initial=jnp.zeros((batch, heads, d, d)),
            read="running",
            implementation=implementation,
        )

    # W x, its erasure, the write, the read: four of d x d
    flops = 8.0 * batch * heads * length * d * d
    return Workload("delta_rule", name, make, call, flops, DELTA_RULE)


def _mlp_memory(name: str, batch: int, heads: int, length: int, d: int, f: int, chunk: int):
    import jax

    from pallas_kernels.mlp_memory import FastWeights, Readout, mlp_memory

    def make(key):
        keys = jax.random.split(key, 8)
        lead = (batch, heads)
        inner = jax.random.normal(keys[0], (*lead, 5, f, d)) * d**-0.5
        outer = jax.random.normal(keys[1], (*lead, 5, d, f)) * 0.3 * f**-0.5
        tokens = [jax.random.normal(k, (*lead, length, d)) * d**-0.5 for k in keys[2:5]]
        momentum = jax.nn.sigmoid(jax.random.normal(keys[5], (*lead, length)))
        of_learning_rate, of_decay = (jax.random.normal(k, (*lead, d)) * d**-0.5 for k in keys[6:])
        bias = jax.numpy.zeros(lead)
        return dict(
            zip(("keys", "values", "queries"), tokens, strict=True),
            momentum=momentum,
            initial=FastWeights(inner, outer, 0 * inner, 0 * outer),
            readout=Readout(of_learning_rate, of_decay, bias - 4, bias + 9),
        )

    def call(arrays, implementation):
        return mlp_memory(**arrays, chunk_size=chunk, implementation=implementation)

    # of two matrices and five memories: key, value, own input, error back (one), erasure, write, S
    flops = 2.0 * 5 * batch * heads * length * d * f * (2 * 6 + 1)
    return Workload("mlp_memory", name, make, call, flops, MLP_MEMORY)


def bfloat16_memory(
    name: str, batch: int, heads: int, length: int, d: int, *, given: bool = False
) -> Workload:
    """HOPE's self-modifying memories, tokens in bfloat16, chunks of 64: what all kernels take.

    Args:
      name: of the workload.
      batch: sequences.
      heads: of each.
      length: tokens of each.
      d: features and hidden units.
      given: whether one memory a head learns a given context instead, without momentum.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels.mlp_memory import mlp_memory

    whole = _mlp_memory(name, batch, heads, length, d, d, 64)

    def make(key):
        arrays = whole.make(key)
        arrays |= {n: arrays[n].astype(jnp.bfloat16) for n in ("keys", "values", "queries")}
        if not given:
            return arrays
        del arrays["readout"]
        gate, weights = arrays.pop("momentum"), arrays["initial"]
        weights = weights._replace(inner_momentum=None, outer_momentum=None)
        weights = jax.tree.map(lambda a: a[..., :1, :, :], weights)
        return arrays | dict(initial=weights, learning_rate=gate / 16, decay=0.99 + 0.01 * gate)

    def call(arrays, implementation):
        return mlp_memory(**arrays, chunk_size=64, implementation=implementation)

    # of two matrices: key, value, error back (one), erasure, write, read
    of_one = 2.0 * batch * heads * length * d * d * (2 * 5 + 1)
    return whole._replace(make=make, call=call, flops=of_one if given else whole.flops)


def _selective_scan(name: str, batch: int, length: int, channels: int, states: int) -> Workload:
    import jax

    from pallas_kernels.selective_scan import selective_scan

    def make(key):
        keys = jax.random.split(key, 5)
        x, step = (jax.random.normal(k, (batch, length, channels)) for k in keys[:2])
        write, read = (jax.random.normal(k, (batch, length, states)) for k in keys[2:4])
        decay = -jax.numpy.exp(jax.random.normal(keys[4], (channels, states)))
        return dict(x=x, step=jax.nn.softplus(step), decay=decay, write=write, read=read)

    def call(arrays, implementation):
        return selective_scan(**arrays, implementation=implementation)

    flops = 7.0 * batch * length * channels * states
    return Workload("selective_scan", name, make, call, flops, ("reference", "xla", "pallas_tpu"))


def newton_schulz(name: str, stack: int, rows: int, columns: int) -> Workload:
    """The quintic iteration on a stack of float32 matrices."""
    import jax

    from pallas_kernels.newton_schulz import newton_schulz

    def make(key):
        return dict(x=jax.random.normal(key, (stack, rows, columns)))

    def call(arrays, implementation):
        return newton_schulz(**arrays, implementation=implementation)

    small, large = sorted((rows, columns))
    flops = 5.0 * stack * 2 * small * small * (2 * large + small)
    return Workload("newton_schulz", name, make, call, flops, ("reference", "xla", "pallas_tpu"))


def _attention(
    name: str, batch: int, heads: int, length: int, d: int, dtype: str, window: int | None = None
) -> Workload:
    import jax

    from pallas_kernels.attention import attention

    def make(key):
        drawn = jax.random.normal(key, (3, batch, length, heads, d), dtype)
        return dict(zip(("queries", "keys", "values"), drawn, strict=True))

    def call(arrays, implementation):
        return attention(**arrays, window=window, implementation=implementation)

    # two products for each query and key that it sees
    near = min(window or length, length)
    pairs = near * length - near * (near - 1) // 2
    implementations = ("reference", "xla", "cudnn", "pallas_tpu")
    return Workload("attention", name, make, call, 4.0 * batch * heads * pairs * d, implementations)


def workloads(scale: str) -> list[Workload]:
    """The named workloads: "cpu" (seconds on a core) or "accelerator" (of the larger presets)."""
    if scale == "cpu":
        made = [_delta_rule(f"L4096 chunk {c}", 4, 4, 4096, 64, c) for c in (16, 32, 64, 128)]
        made += [_mlp_memory("L1024 64-64-64 chunk 32", 1, 4, 1024, 64, 64, 32)]
        made += [_selective_scan("L1024 256 x 16", 4, 1024, 256, 16)]
        made += [_attention("L1024 d64", 4, 4, 1024, 64, "float32")]
        return [*made, newton_schulz("8 x 256 x 256", 8, 256, 256)]
    made = [_delta_rule(f"L{n} d128 chunk 64", 8, 16, n, 128, 64) for n in (4096, 16384)]
    made += [gated_delta_rule(f"L{n} d128 gated", 8, 16, n, 128) for n in (4096, 16384)]
    made += [_mlp_memory(f"{n} chunk 64", 8, h.heads, 4096, *h[1:], 64) for n, h in PRESETS.items()]
    made += [bfloat16_memory("340m bfloat16", 8, 16, 4096, 64)]
    made += [bfloat16_memory("340m given context", 8, 16, 4096, 64, given=True)]
    made += [_mlp_memory("128-512-128 chunk 64", 8, 16, 4096, 128, 512, 64)]
    made += [_selective_scan("L4096 2048 x 16", 8, 4096, 2048, 16)]
    made += [_attention("L4096 d64 bfloat16", 8, 16, 4096, 64, "bfloat16")]
    made += [_attention("L16384 d128 window 2048", 1, 16, 16384, 128, "bfloat16", 2048)]
    return [*made, newton_schulz("16 x 1024 x 1024", 16, 1024, 1024)]


def measure(
    scale: str | None = None, *, ops: Sequence[str] = (), repeats: int = 3, given: Sequence = ()
) -> list[dict[str, Any]]:
    """One row for each workload, implementation and direction.

    Args:
      scale: see `workloads`; None chooses by the device.
      ops: names of operations; none for all.
      repeats: timed calls, after one that compiles and one that warms up; the median counts.
      given: workloads in place of the named ones.

    Returns:
      Rows of `op`, `workload`, `implementation`, `direction` ("forward" or "forward+backward"),
      `device`, `milliseconds`, `clock` ("device" or "host"), `flops_per_second`,
      `bytes_per_second`, `roofline` (see `devices.roofline`; None on a CPU), `temp_bytes`, and
      `refused`, the reason where an implementation does not take the workload (then there are no
      figures).
    """
    import jax

    device = jax.devices()[0]
    scale = scale or ("cpu" if device.platform == "cpu" else "accelerator")
    rows = []
    for workload in given or workloads(scale):
        if ops and workload.op not in ops:
            continue
        arrays = jax.jit(workload.make)(jax.random.key(0))
        for implementation in workload.implementations:
            for direction in ("forward", "forward+backward"):
                row = {"op": workload.op, "workload": workload.name}
                row |= {"implementation": implementation, "direction": direction}
                row |= {"device": device.device_kind, "refused": None}
                figures = _row(workload, arrays, implementation, direction, repeats)
                rows.append(row | figures)
    return rows


def passes_of(workload: Workload, implementation: str, direction: str) -> tuple[Any, int]:
    """The function of one row, and how many forward passes its work counts as."""
    import jax
    import jax.numpy as jnp

    def forward(arrays):
        return workload.call(arrays, implementation)

    def total(arrays):
        leaves = (leaf.astype(jnp.float32) for leaf in jax.tree.leaves(forward(arrays)))
        return sum(jnp.sum(leaf * leaf) for leaf in leaves)

    return (forward, 1) if direction == "forward" else (jax.grad(total), 3)


def _row(workload, arrays, implementation, direction, repeats) -> dict[str, Any]:
    import jax

    from nestedjax.benchmarks import devices

    function, passes = passes_of(workload, implementation, direction)
    platform = jax.devices()[0].platform
    for kind in ("tpu", "gpu"):
        if implementation == f"pallas_{kind}" and platform != kind:
            return _refused(f"a {kind.upper()} kernel does not run on a {platform}")
    try:
        compiled = jax.jit(function).lower(arrays).compile()
    except NotImplementedError as error:
        return _refused(str(error))
    out = jax.block_until_ready(compiled(arrays))
    seconds, clock = devices.seconds(lambda: compiled(arrays), repeats)
    memory = compiled.memory_analysis()
    flops = passes * workload.flops
    moved = float(sum(leaf.nbytes for leaf in jax.tree.leaves((arrays, out))))
    return {
        "milliseconds": 1e3 * seconds,
        "clock": clock,
        "flops_per_second": flops / seconds,
        "bytes_per_second": moved / seconds,
        "roofline": devices.roofline(jax.devices()[0].device_kind, flops, moved, seconds),
        "temp_bytes": memory.temp_size_in_bytes if memory else None,
    }


def _refused(reason: str) -> dict[str, Any]:
    names = ("milliseconds", "clock", "flops_per_second", "bytes_per_second", "roofline")
    return {name: None for name in (*names, "temp_bytes")} | {"refused": reason}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for a terminal."""
    head = f"{'operation':15}{'workload':25}{'implementation':15}{'direction':18}"
    lines = [
        head + f"{'ms':>10}{'clock':>8}{'GFLOP/s':>9}{'GB/s':>8}{'of peak':>9}{'temp MiB':>10}"
    ]
    for row in rows:
        line = f"{row['op']:15}{row['workload']:25}{row['implementation']:15}{row['direction']:18}"
        if row["refused"]:
            lines.append(line + f"  {row['refused']}")
            continue
        share = "-" if row["roofline"] is None else f"{row['roofline']:.0%}"
        lines.append(
            line + f"{row['milliseconds']:>10.1f}{row['clock']:>8}"
            f"{row['flops_per_second'] / 1e9:>9.2f}{row['bytes_per_second'] / 1e9:>8.2f}"
            f"{share:>9}{(row['temp_bytes'] or 0) / 2**20:>10.1f}"
        )
    return "\n".join(lines)
