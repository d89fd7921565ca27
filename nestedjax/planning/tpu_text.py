"""The TPU compiler's own count of cycles: of a program's text, and of a kernel's schedule.

XLA writes `estimated_cycles` beside its fusions and copies, once for a loop's body; a kernel made
by Mosaic has none there, but the compiler leaves its schedule, one line for each bundle of
instructions, a cycle each, where `LIBTPU_INIT_ARGS` says (`dump_flags`).
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(")
_NAME = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = ")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_WHILE = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LIMIT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_CALL = re.compile(r" (?:call|async-start)\(.*(?:to_apply|calls)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[su]8|bf16|f16|[suf]32|[suf]64)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")

_BUNDLE = re.compile(r"^\s*0x[0-9a-f]+\s+(LB)?\s*:?|^\s*0\s+:")
_EXIT_TEST = re.compile(r"(%p\w+) = scmp\.ge\.s32\.totalorder [^,;]+, (\d+)")
_BACK = re.compile(r"sbr\.rel \(!(%p\w+)\) target")
_AHEAD = 2  # steps of a grid's loop in which only blocks are copied


class Program(NamedTuple):
    """What a program runs, loops counted as often as they run.

    Attributes:
      cycles: of XLA's own instructions.
      calls: of each kernel, by the name of its instruction.
      moved: bytes of each kernel's operands and results.
    """

    cycles: float
    calls: dict[str, float]
    moved: dict[str, int]


def dump_flags(directory: str | Path) -> str:
    """What `LIBTPU_INIT_ARGS` must be for schedules in a directory."""
    return (
        f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
    )


def program(text: str) -> Program:
    """What `compiled.as_text()` says."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and line.rstrip().endswith("{"):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    found = Program(0.0, {}, {})
    return found._replace(cycles=_cycles(entry, 1.0, bodies, found))


def _cycles(name: str, times: float, bodies: dict[str, list[str]], found: Program) -> float:
    total = 0.0
    for line in bodies.get(name, []):
        estimate = _CYCLES.search(line)
        total += times * int(estimate[1]) if estimate else 0.0
        loop, call, branches = _WHILE.search(line), _CALL.search(line), _BRANCHES.search(line)
        if '"tpu_custom_call"' in line:
            kernel = _NAME.match(line)
            assert kernel is not None, line
            found.calls[kernel[1]] = found.calls.get(kernel[1], 0.0) + times
            found.moved[kernel[1]] = _bytes(line)
        elif loop:
            total += _cycles(loop[2], times * _trips(line, bodies[loop[1]]), bodies, found)
        elif call:
            total += _cycles(call[1], times, bodies, found)
        elif branches:  # the dearest one
            names = [part.strip().lstrip("%") for part in branches[1].split(",")]
            total += max(_cycles(one, times, bodies, found) for one in names)
    return total


def _trips(line: str, condition: list[str]) -> int:
    known = _KNOWN.search(line)
    limits = [int(m[1]) for m in map(_LIMIT.search, condition) if m]
    return int(known[1]) if known else max(limits, default=1)


def _bytes(line: str) -> int:
    """Of the results and operands of a kernel's call; those that are in VMEM already count too."""
    results, _, rest = line.partition(" custom-call(")
    operands = rest.partition("operand_layout_constraints={")[2].partition("}, ")[0]
    total = 0
    for kind, shape in _ARRAY.findall(results + operands):
        bits = int(_BITS.findall(kind)[0]) if kind != "pred" else 8
        total += math.prod(int(n) for n in shape.split(",") if n) * bits // 8
    return total


class Schedule(NamedTuple):
    """The schedule of one kernel.

    Attributes:
      bundles: written down.
      cycles: bundles run, by its loops' trips; code that not every step runs is counted in each.
    """

    bundles: int
    cycles: float


def schedules(directory: str | Path) -> dict[str, Schedule]:
    """The schedules that a compilation left, by the name of the kernel's instruction."""
    found = {}
    for path in Path(directory).glob("*-01-final_bundles.txt"):
        name = path.name.removesuffix("-01-final_bundles.txt").partition("-")[2]
        found[name] = schedule(path.read_text())
    return found


def schedule(text: str) -> Schedule:
    """The schedule in one dump: a line a bundle, LB at a loop's first, an exit test at its last."""
    limits: dict[str, int] = {}
    open_loops = [0.0]  # bundles run in each of the loops that a line is in, outermost first
    bundles = 0
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle is None:
            continue
        if bundle[1]:
            open_loops.append(0.0)
        bundles += 1
        open_loops[-1] += 1
        limits |= {name: int(limit) for name, limit in _EXIT_TEST.findall(line)}
        back = _BACK.search(line)
        if back and back[1] in limits and len(open_loops) > 1:
            inside, limit = open_loops.pop(), limits[back[1]]
            trips = limit - _AHEAD if len(open_loops) == 1 else limit
            open_loops[-1] += inside * max(trips, 1)
    return Schedule(bundles, sum(open_loops))
