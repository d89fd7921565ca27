"""What TPU kernels share: a scan over chunks as one kernel, and what fits in VMEM."""
