"""The delta-rule recurrence that nearly every memory update reduces to."""

from pallas_kernels.delta_rule.api import delta_chunk, delta_rule
from pallas_kernels.delta_rule.types import DeltaOutput

__all__ = ["DeltaOutput", "delta_chunk", "delta_rule"]
