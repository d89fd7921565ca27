"""Compositions of levels under nested `jax.vmap`s; and all memories, compiled as users do."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from nestedjax import levels
from tests.contracts.test_levels_sharded import cases
from tests.vmaps import check_vmaps

CASES = {name: (system, params) for name, system, params in cases()}


@pytest.mark.parametrize("name", [name for name in CASES if name != "chain"])
def test_nested_vmaps_of_compositions_are_loops(name):
    system, params = CASES[name]

    def draw(i):
        rng = np.random.default_rng(i)
        scaled = jax.tree.map(lambda a: np.float32(a * rng.uniform(0.8, 1.1)), params)
        return scaled, rng.standard_normal((13, 3)).astype(np.float32)

    def both(given):
        params, x = given
        y, carry = levels.run(system, params, system.init(params), x)
        return y, carry.state

    check_vmaps(both, draw, rtol=1e-3, atol=1e-4)


def test_with_xla_as_users_have_it():
    """Here the suite's own flags turn the optimisation of the backend down."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.contracts.vmapped"]
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.endswith("all\n"), ran.stdout + ran.stderr[-2000:]
