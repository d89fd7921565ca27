"""Measure what things cost. `peers`: training speed and peak memory of HOPE and its peers at one
size (vocab 512, width 256, 4 layers, 4 heads, chunks of 64), each in a process of its own on one
core. `optimizers`: step time and state of every optimizer, relative to AdamW, on one model.
`kernels`: every operation of `pallas_kernels` on this device. `memory`: what a longer text costs
HOPE in memory."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

EXAMPLE = """example:
  nestedjax bench peers --json peers.json
  nestedjax bench peers --models hope --cost-at 1024 4096 16384
  nestedjax bench optimizers --names m3 adamuon
  nestedjax bench kernels --ops delta_rule --json kernels.json
  nestedjax bench kernels --against fla --repeats 20
  nestedjax bench kernels --tpu-estimates v5e v5p v6e --json estimates.json
  nestedjax bench memory --lengths 4096 16384

A row of peers has model, length, batch, parameters, tokens_per_cpu_second (of the median step),
peak_rss_mb (of the whole process, compilation included) and allocator (whether freed memory is
"kept", as in training; NESTEDJAX_ALLOCATOR=system leaves the allocator as it is)."""

HEAD = f"{'model':18}{'length':>8}{'batch':>7}{'parameters':>12}{'tokens/CPU-s':>14}{'peak MB':>9}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    what = parser.add_subparsers(dest="what", required=True, metavar="BENCHMARK")
    _peers_arguments(what.add_parser("peers", help="HOPE and its peers"))
    _optimizers_arguments(what.add_parser("optimizers", help="every optimizer"))
    _kernels_arguments(what.add_parser("kernels", help="every operation"))
    memory = what.add_parser("memory", help="what a longer text costs")
    memory.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    memory.add_argument("--lengths", nargs=2, type=int, default=[4096, 16384], help="tokens")


def _peers_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="default: all of them")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument(
        "--cost-at",
        nargs="*",
        type=int,
        default=[],
        metavar="LENGTH",
        help="also each model at batch 1 and these lengths: the cost of a token in a long text",
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each row")
    parser.add_argument("--core", type=int, help="index of the core; default: the last one")


def _optimizers_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--names", nargs="+", metavar="NAME", default=[], help="default: all")
    parser.add_argument("--preset", default="transformer_micro", help="whose weights are updated")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of each sequence")


def _kernels_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--ops", nargs="+", metavar="OP", default=[], help="default: all")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each row")
    parser.add_argument(
        "--against",
        choices=["fla"],
        help="only the gated delta rule, against that of flash-linear-attention (needs a GPU)",
    )
    parser.add_argument(
        "--tpu-estimates",
        nargs="*",
        metavar="TPU",
        help="the TPU compiler's estimates for v5e, v5p, v6e (needs the tpu extra, no TPU)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure every row; returns the exit code."""
    commands = {"peers": _peers, "optimizers": _optimizers, "kernels": _kernels, "memory": _memory}
    rows = commands[args.what](args)
    _write(args, rows)
    return 0


def _write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


def _optimizers(args: argparse.Namespace) -> list[dict[str, Any]]:
    from nestedjax.benchmarks import optimizers
    from nestedjax.optim import menu
    from nestedjax.overrides import ConfigError

    known = ("adamw", "muon (optax)", *menu.OPTIMIZERS)
    for name in args.names:
        if name not in known:
            raise ConfigError(f"no optimizer {name!r} in this benchmark; {', '.join(known)}")
    rows: list[dict[str, Any]] = []
    print(optimizers.HEAD)
    for row in optimizers.measure(
        args.preset, batch=args.batch, length=args.length, names=tuple(args.names)
    ):
        print(optimizers.line(row), flush=True)
        rows.append(row)
        _write(args, rows)
    return rows


def _kernels(args: argparse.Namespace) -> list[dict[str, Any]]:
    from nestedjax.benchmarks import kernels
    from nestedjax.overrides import ConfigError

    known = sorted({workload.op for workload in kernels.workloads("cpu")})
    for op in args.ops:
        if op not in known:
            raise ConfigError(f"no operation {op!r} in this benchmark; {', '.join(known)}")
    if args.repeats < 1:
        raise ConfigError(f"--repeats {args.repeats} must be at least 1")
    if args.against and args.ops:
        raise ConfigError(
            f"--ops {' '.join(args.ops)} does not go with --against {args.against}, which times the"
            " gated delta rule alone; leave one of them out"
        )
    if args.against and args.tpu_estimates is not None:
        raise ConfigError("--against and --tpu-estimates are two benchmarks: leave one of them out")
    if args.against == "fla":
        from nestedjax.benchmarks import against_fla

        rows = against_fla.measure(repeats=args.repeats)
        print(against_fla.table(rows))
        return rows
    if args.tpu_estimates is not None:
        return _tpu_estimates(args)
    rows = kernels.measure(ops=args.ops, repeats=args.repeats)
    print(kernels.table(rows))
    return rows


def _tpu_estimates(args: argparse.Namespace) -> list[dict[str, Any]]:
    from nestedjax.benchmarks import kernels, tpu_estimates

    rows: list[dict[str, Any]] = []
    for row in tpu_estimates.measure(args.tpu_estimates, ops=args.ops):
        rows.append(row)
        head, *line = kernels.table([row]).splitlines()
        if len(rows) == 1:
            print(f"{'device':14}{head}")
        print(f"{row['device']:14}{line[0]}", flush=True)
        _write(args, rows)
    return rows


def _memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    from nestedjax.benchmarks import memory, peers
    from nestedjax.overrides import ConfigError

    first, second = args.lengths
    if first < 1 or second <= first or first % peers.CHUNK or second % peers.CHUNK:
        raise ConfigError(
            f"--lengths {first} {second}: give two multiples of {peers.CHUNK}, the longer one last"
        )
    rows = memory.measure(args.lengths)
    print(memory.table(rows))
    return rows


def _peers(args: argparse.Namespace) -> list[dict[str, Any]]:
    from nestedjax.benchmarks import peers
    from nestedjax.overrides import ConfigError

    models = args.models or list(peers.MODELS)
    for name in models:
        if name not in peers.MODELS:
            raise ConfigError(f"no model {name!r} in this benchmark; {', '.join(peers.MODELS)}")
    for name in ("length", "batch", "steps"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)} must be at least 1")
    cores = sorted(os.sched_getaffinity(0))
    core = cores[-1] if args.core is None else args.core
    if core not in cores:
        raise ConfigError(f"--core {core} is not one of this process: {cores}")
    workloads = [peers.Workload(name, args.length, args.batch, args.steps) for name in models]
    workloads += [
        peers.Workload(name, length, 1, args.steps) for name in models for length in args.cost_at
    ]
    rows = []
    print(HEAD)
    for workload in workloads:
        rows.append(peers.isolated(workload, core=core))
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"{row['model']:18}{row['length']:>8}{row['batch']:>7}{row['parameters']:>12,}"
        f"{row['tokens_per_cpu_second']:>14,.0f}{row['peak_rss_mb']:>9,.0f}"
    )
