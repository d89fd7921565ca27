"""Memory that a program has once touched stays with it: fresh pages cost a CPU 6-30% of a step."""

import ctypes
import os
import sys

# mallopt(3). Freed memory is neither mapped anew for each large array (MMAP_MAX), nor given back to
# the system (TRIM_THRESHOLD), nor kept apart for each thread (ARENA_MAX).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
# Several devices of one process allocate at once, and wait for each other in a single arena:
# hope_nano on two of them trains at 3,400 tokens a second with it, at 10,500 without.
_ONE_DEVICE = ((_M_ARENA_MAX, 1),)


def keep_pages() -> str:
    """Let malloc keep what is freed, for the rest of this process; before JAX is imported.

    For the command line only: a library does not change its host's allocator. It does nothing where
    JAX is imported already, where the C library is not glibc, where the user's own settings are
    found (`GLIBC_TUNABLES` for malloc or a preloaded library), or with `NESTEDJAX_ALLOCATOR=system`
    in the environment.

    Returns:
      "kept", or why it did nothing: "system", "user" or "not glibc".
    """
    if os.environ.get("NESTEDJAX_ALLOCATOR") == "system" or "jax" in sys.modules:
        return "system"
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or os.environ.get("LD_PRELOAD"):
        return "user"
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):
        return "not glibc"
    mallopt = ctypes.CDLL(None).mallopt
    settings: tuple[tuple[int, int], ...] = _SETTINGS
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        settings += _ONE_DEVICE
    return "kept" if all(mallopt(option, value) for option, value in settings) else "system"
