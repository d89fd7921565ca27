"""Compiling for a Hopper GPU on a machine that has none (needs the `cuda` extra)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What XLA asks a device for; of an H100 with 80 GB
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest number of an array


def assert_close(found, expected, tolerance, *, least=1.0):
    """Every array within a tolerance of its largest number, or of `least`."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        scale, name = max(least, float(jnp.max(jnp.abs(b)))), jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, err_msg=name)


def compiled(function, *operands):
    """The program for one H100, machine code of its Mosaic GPU kernels included."""
    pytest.importorskip("jax_plugins.xla_cuda12", reason="needs the cuda extra: make gpu-compile")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_TARGET, topology="1x1x1"
    )
    sharding = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), operands
    )
    return jax.jit(function).lower(*placed).compile()


def lowered(function, *operands) -> str:
    """The program as it is handed to a CUDA device's compiler, kernels as Mosaic GPU modules."""
    return jax.export.export(jax.jit(function), platforms=["cuda"])(*operands).mlir_module()


def assembled(text: str) -> dict[str, dict[str, int]]:
    """Of each kernel, what ptxas said of it (to stdout, with MOSAIC_GPU_DUMP_PTXAS=1)."""
    found = {}
    pattern = r"Compiling entry function '(\w+)_mosaic_gpu_kernel' for 'sm_90a'(.*?)Compile time"
    for name, said in re.findall(pattern, text, re.DOTALL):
        registers = re.search(r"Used (\d+) registers", said)
        spilled = re.search(r"(\d+) bytes spill stores", said)
        found[name] = {"registers": int(registers[1]), "spilled": int(spilled[1])}
    return found


def required() -> None:
    """Skip a test where there is no GPU."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU: make gpu-test")
