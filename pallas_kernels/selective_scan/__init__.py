"""Mamba's selective scan: a diagonal recurrence whose decay and input depend on the token."""

from pallas_kernels.selective_scan.api import ScanOutput, selective_scan

__all__ = ["ScanOutput", "selective_scan"]
