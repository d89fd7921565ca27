"""The TPU compiler's own count of cycles: of a program's text, and of a kernel's schedule."""

import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_KERNEL = re.compile(r'op_name="[^"]*?([\w.\-]+)"')


class Cost(NamedTuple):
    """What a program runs, loops counted as often as they run.

    Attributes:
      cycles: of XLA's own instructions.
      kernels: how often each Mosaic kernel is called, by the name of its instruction.
    """

    cycles: float
    kernels: dict[str, float]


def program_cost(text: str) -> Cost:
    """The cost of a compiled program, from `compiled.as_text()`."""
    bodies, entry = _computations(text)
    kernels: dict[str, float] = {}
    return Cost(_cycles(entry, 1.0, bodies, kernels), kernels)
