"""Measure what things cost. `peers`: training speed and peak memory of HOPE and its peers at one
size (vocab 512, width 256, 4 layers, 4 heads, chunks of 64), each in a process of its own on one
core."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

EXAMPLE = """example:
  nestedjax bench peers --json peers.json
  nestedjax bench peers --models hope --cost-at 1024 4096 16384

A row has model, length, batch, parameters, tokens_per_cpu_second (of the median step) and
peak_rss_mb (of the whole process, compilation included)."""

HEAD = f"{'model':18}{'length':>8}{'batch':>7}{'parameters':>12}{'tokens/CPU-s':>14}{'peak MB':>9}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("what", choices=["peers"], help="which benchmark")
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


def run(args: argparse.Namespace) -> int:
    """Measure every row; returns the exit code."""
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
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"{row['model']:18}{row['length']:>8}{row['batch']:>7}{row['parameters']:>12,}"
        f"{row['tokens_per_cpu_second']:>14,.0f}{row['peak_rss_mb']:>9,.0f}"
    )
