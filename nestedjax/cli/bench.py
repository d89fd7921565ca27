"""Measure what things cost.

peers       training speed and peak memory of HOPE and its peers at one size (vocab 512, width
            256, 4 layers, 4 heads, chunks of 64), each in a process of its own on one core
optimizers  step time and state of every optimizer, relative to AdamW, on one model
kernels     every operation of pallas_kernels on this device
memory      what a longer text costs HOPE in memory"""

import json as json_format
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from nestedjax.cli.command import UsageError, parse
from nestedjax.cli.errors import guarded

EXAMPLE = """  nestedjax bench peers --json peers.json
  nestedjax bench peers --models hope --cost-at 1024 4096 16384
  nestedjax bench optimizers --names m3 adamuon
  nestedjax bench kernels --ops delta_rule --json kernels.json
  nestedjax bench kernels --against fla --repeats 20
  nestedjax bench kernels --tpu-estimates v5e v5p v6e --json estimates.json
  nestedjax bench memory --lengths 4096 16384

A row of peers has model, length, batch, parameters, tokens_per_cpu_second (of the median step),
peak_rss_mb (of the whole process, compilation included) and allocator (whether freed memory is
"kept", as in training; NESTEDJAX_ALLOCATOR=system leaves the allocator as it is).
"""

HEAD = f"{'model':18}{'length':>8}{'batch':>7}{'parameters':>12}{'tokens/CPU-s':>14}{'peak MB':>9}"

Rows = list[dict[str, Any]]


def main(argv: Sequence[str]) -> int:
    """`nestedjax bench`; returns the exit code."""
    from nestedjax.errors import near

    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(f"usage: nestedjax bench BENCHMARK [FLAGS]\n\n{__doc__}\n\nexample:\n{EXAMPLE}")
        return 0
    if name not in BENCHMARKS:
        raise UsageError(f"no benchmark {name!r}; {near(name, BENCHMARKS)}")
    function = BENCHMARKS[name]
    about = (function.__doc__ or "").split("\n")[0]
    call = parse(f"nestedjax bench {name}", function, argv[1:], about=about, example=EXAMPLE)
    return 0 if call is None else guarded("bench", call)


def _write(json: str | None, rows: Rows) -> None:
    if json is not None:
        Path(json).write_text(json_format.dumps(rows, indent=1) + "\n")


def optimizers(
    *,
    json: str | None = None,
    names: tuple[str, ...] = (),
    preset: str = "transformer_micro",
    batch: int = 4,
    length: int = 256,
) -> int:
    """Step time and state of every optimizer, relative to AdamW's.

    Args:
      json: write the rows to this file.
      names: which optimizers; none for all.
      preset: the model whose weights are updated.
      batch: sequences of a step.
      length: tokens of each sequence.
    """
    from nestedjax.benchmarks import optimizers
    from nestedjax.errors import ConfigError
    from nestedjax.optim import menu

    known = ("muon (optax)", *menu.OPTIMIZERS)
    for name in names:
        if name not in known:
            raise ConfigError(f"no optimizer {name!r} in this benchmark; {', '.join(known)}")
    rows: Rows = []
    print(optimizers.HEAD)
    for row in optimizers.measure(preset, batch=batch, length=length, names=names):
        print(optimizers.line(row), flush=True)
        rows.append(row)
        _write(json, rows)
    return 0


def kernels(
    *,
    json: str | None = None,
    ops: tuple[str, ...] = (),
    repeats: int = 3,
    against: Literal["fla"] | None = None,
    tpu_estimates: Annotated[tuple[str, ...] | None, Parameter(consume_multiple=(0, 9))] = None,
) -> int:
    """Time every operation on this device.

    Args:
      json: write the rows to this file.
      ops: which operations; none for all.
      repeats: timed calls of each row.
      against: only the gated delta rule, against that of flash-linear-attention (needs a GPU).
      tpu_estimates: the TPU compiler's estimates for v5e, v5p, v6e, or those that are named (needs
        the tpu extra, no TPU).
    """
    from nestedjax.benchmarks import kernels
    from nestedjax.errors import ConfigError

    known = sorted({workload.op for workload in kernels.workloads("cpu")})
    for op in ops:
        if op not in known:
            raise ConfigError(f"no operation {op!r} in this benchmark; {', '.join(known)}")
    if repeats < 1:
        raise ConfigError(f"--repeats {repeats} must be at least 1")
    if against and ops:
        raise ConfigError(
            f"--ops {' '.join(ops)} does not go with --against {against}, which times the"
            " gated delta rule alone; leave one of them out"
        )
    if against and tpu_estimates is not None:
        raise ConfigError("--against and --tpu-estimates are two benchmarks: leave one of them out")
    if against == "fla":
        from nestedjax.benchmarks import against_fla

        rows = against_fla.measure(repeats=repeats)
        print(against_fla.table(rows))
    elif tpu_estimates is not None:
        rows = _estimates(list(tpu_estimates), list(ops), json)
    else:
        rows = kernels.measure(ops=list(ops), repeats=repeats)
        print(kernels.table(rows))
    _write(json, rows)
    return 0


def _estimates(devices: list[str], ops: list[str], json: str | None) -> Rows:
    from nestedjax.benchmarks import kernels, tpu_estimates

    rows: Rows = []
    for row in tpu_estimates.measure(devices, ops=ops):
        rows.append(row)
        head, *line = kernels.table([row]).splitlines()
        if len(rows) == 1:
            print(f"{'device':14}{head}")
        print(f"{row['device']:14}{line[0]}", flush=True)
        _write(json, rows)
    return rows


def memory(*, json: str | None = None, lengths: tuple[int, int] = (4096, 16384)) -> int:
    """What a longer text costs HOPE in memory.

    Args:
      json: write the rows to this file.
      lengths: two, in tokens, the longer one last.
    """
    from nestedjax.benchmarks import memory, peers
    from nestedjax.errors import ConfigError

    first, second = lengths
    if first < 1 or second <= first or first % peers.CHUNK or second % peers.CHUNK:
        raise ConfigError(
            f"--lengths {first} {second}: give two multiples of {peers.CHUNK}, the longer one last"
        )
    rows = memory.measure(list(lengths))
    print(memory.table(rows))
    _write(json, rows)
    return 0


def peers(
    *,
    json: str | None = None,
    models: tuple[str, ...] = (),
    length: int = 1024,
    batch: int = 4,
    cost_at: tuple[int, ...] = (),
    steps: int = 5,
    core: int | None = None,
) -> int:
    """Training speed and peak memory of HOPE and its peers.

    Args:
      json: write the rows to this file.
      models: which; none for all of them.
      length: tokens of each sequence.
      batch: sequences of a step.
      cost_at: also each model at batch 1 and these lengths, in tokens: what a token costs in a
        long text.
      steps: timed steps of each row.
      core: index of the core; none for the last one.
    """
    from nestedjax.benchmarks import peers
    from nestedjax.errors import ConfigError

    models = models or tuple(peers.MODELS)
    for name in models:
        if name not in peers.MODELS:
            raise ConfigError(f"no model {name!r} in this benchmark; {', '.join(peers.MODELS)}")
    for name, value in {"length": length, "batch": batch, "steps": steps}.items():
        if value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    cores = sorted(os.sched_getaffinity(0))
    core = cores[-1] if core is None else core
    if core not in cores:
        raise ConfigError(f"--core {core} is not one of this process: {cores}")
    workloads = [peers.Workload(name, length, batch, steps) for name in models]
    workloads += [peers.Workload(name, size, 1, steps) for name in models for size in cost_at]
    rows: Rows = []
    print(HEAD)
    for workload in workloads:
        rows.append(peers.isolated(workload, core=core))
        print(line(rows[-1]), flush=True)
    _write(json, rows)
    return 0


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"{row['model']:18}{row['length']:>8}{row['batch']:>7}{row['parameters']:>12,}"
        f"{row['tokens_per_cpu_second']:>14,.0f}{row['peak_rss_mb']:>9,.0f}"
    )


BENCHMARKS: dict[str, Callable[..., int]] = {
    "peers": peers,
    "optimizers": optimizers,
    "kernels": kernels,
    "memory": memory,
}
