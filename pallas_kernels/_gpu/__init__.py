"""What GPU kernels share: tiles of one warpgroup."""
