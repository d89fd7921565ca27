"""What the TPU compiler expects of every operation, on a machine without a TPU.

    nestedjax bench kernels --tpu-estimates v5e v5p v6e --ops mlp_memory --json estimates.json

Each row is compiled ahead of time in a process of its own (needs the `tpu` extra). Its cycles are
XLA's `estimated_cycles`, a loop's body counted as often as it runs, plus for each Mosaic kernel the
longer of the bundles of its schedule, a cycle each, and its operands and results at the bandwidth
of HBM. What these miss: waits for memory that the schedule does not show, collectives, copies that
run beside other work, the time between kernels. Good for ranking, not for promises.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from nestedjax import planning
from nestedjax.benchmarks import devices
from nestedjax.benchmarks.kernels import Workload, _refused, newton_schulz, workloads
from nestedjax.errors import ConfigError
from nestedjax.planning.topology import ENVIRONMENT, TPUS

LIMIT = 900  # seconds for one row
# Cycles a second at which the matrix units reach the published peak.
CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}


def _one_memory(chunk: int) -> Workload:
    """One memory of 128-512-128 in a context that is given, values too; bfloat16 tokens."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.mlp_memory import FastWeights, Rule, mlp_memory

    lead, length, d, f = (8, 16), 4096, 128, 512

    def make(key):
        keys = jax.random.split(key, 7)
        tokens = [jax.random.normal(k, (*lead, length, d), jnp.bfloat16) for k in keys[:3]]
        learning_rate, decay = (
            jax.nn.sigmoid(jax.random.normal(k, (*lead, length))) for k in keys[3:5]
        )
        inner = jax.random.normal(keys[5], (*lead, 1, f, d)) * d**-0.5
        outer = jax.random.normal(keys[6], (*lead, 1, d, f)) * 0.3 * f**-0.5
        start = FastWeights(inner, outer, None, None)
        named = dict(zip(("keys", "values", "queries"), tokens, strict=True))
        return dict(**named, learning_rate=learning_rate, decay=0.9 + 0.1 * decay, initial=start)

    def call(arrays, implementation):
        rule = Rule(values="shared")
        return mlp_memory(**arrays, rule=rule, chunk_size=chunk, implementation=implementation)

    # of two matrices: key, error back (one), erasure, write, read
    flops = 2.0 * math.prod(lead) * length * d * f * (2 * 4 + 1)
    name = f"one 128-512-128 chunk {chunk}"
    return Workload("mlp_memory", name, make, call, flops, ("xla", "pallas_tpu"))


def estimated() -> list[Workload]:
    """The workloads: those of an accelerator at 4,096 tokens, and one large memory by itself."""
    named = [w for w in workloads("accelerator") if "L16384" not in w.name]
    named.append(newton_schulz("16 x 256 x 256", 16, 256, 256))
    return [*named, *(_one_memory(chunk) for chunk in (64, 128, 256))]


def measure(generations: Sequence[str], *, ops: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """One row for each generation, workload, implementation ("xla", "pallas_tpu") and direction.

    Args:
      generations: names in `CLOCKS`; none for all.
      ops: names of operations; none for all.

    Yields:
      The keys of `kernels.measure`, and `cycles`, `bundles` (of the kernels, as written down) and
      `clock`, which is "estimate".

    Raises:
      ConfigError: the compiler is not installed, or a generation is not known.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("--tpu-estimates needs the TPU compiler: pip install 'nestedjax[tpu]'")
    for name in generations:
        if name not in CLOCKS:
            raise ConfigError(f"no estimates for {name!r}; {', '.join(CLOCKS)}")
    for index, workload in enumerate(estimated()):
        if ops and workload.op not in ops:
            continue
        for generation in generations or CLOCKS:
            for implementation in ("xla", "pallas_tpu"):
                for direction in ("forward", "forward+backward"):
                    row: dict[str, Any] = {
                        "op": workload.op,
                        "workload": workload.name,
                        "clock": "estimate",
                    }
                    row |= {"implementation": implementation, "direction": direction}
                    row["device"] = TPUS[generation].kind
                    found = _isolated([str(index), generation, implementation, direction])
                    yield {"cycles": None, "bundles": None, "refused": None} | found | row


def _isolated(arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        return isolated(directory, *arguments)


def isolated(directory: str, *arguments: str) -> dict[str, Any]:
    """The figures of one row, compiled in a process whose flags say where schedules go.

    Args:
      directory: for the schedules.
      arguments: index in `estimated()`, generation, implementation, direction.
    """
    environment = os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
    environment["LIBTPU_INIT_ARGS"] = planning.dump_flags(directory)
    command = [sys.executable, "-m", __name__, directory, *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return _refused(f"not compiled in {LIMIT} seconds")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        wanted = [line for line in lines if "RESOURCE_EXHAUSTED" in line or "Error" in line]
        return _refused((wanted or lines)[-1][:200])
    return json.loads(done.stdout.splitlines()[-1])


def _figures(directory: str, index: str, name: str, implementation: str, direction: str):
    import jax

    from nestedjax.benchmarks.kernels import passes_of

    workload, tpu, clock = estimated()[int(index)], TPUS[name], CLOCKS[name]
    arrays = jax.eval_shape(workload.make, jax.random.key(0))
    function, passes = passes_of(workload, implementation, direction)
    try:
        compiled, results = planning.compiled_for(tpu, function, arrays)
    except NotImplementedError as error:
        return _refused(str(error))
    program = planning.program(compiled.as_text())
    kernels = planning.schedules(directory)
    per_byte = clock / devices.PEAKS[tpu.kind].bytes_per_second
    cycles = program.cycles + sum(
        calls * max(kernels[kernel].cycles, program.moved[kernel] * per_byte)
        for kernel, calls in program.calls.items()
    )
    seconds = cycles / clock
    leaves = jax.tree.leaves((arrays, results))
    flops = passes * workload.flops
    moved = float(sum(a.size * a.dtype.itemsize for a in leaves))
    return {
        "milliseconds": 1e3 * seconds,
        "flops_per_second": flops / seconds,
        "bytes_per_second": moved / seconds,
        "roofline": devices.roofline(tpu.kind, flops, moved, seconds),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "cycles": cycles,
        "bundles": sum(kernels[kernel].bundles for kernel in program.calls),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_figures(*sys.argv[1:])) + "\n")
