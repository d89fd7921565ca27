"""What a compiler says of a program ahead of time: for a topology that this machine does not have,
and read from its texts.
"""

from nestedjax.planning.topology import TPUS, Topology, compiled_for
from nestedjax.planning.tpu_text import Program, Schedule, dump_flags, program, schedules

__all__ = [
    "TPUS",
    "Program",
    "Schedule",
    "Topology",
    "compiled_for",
    "dump_flags",
    "program",
    "schedules",
]
