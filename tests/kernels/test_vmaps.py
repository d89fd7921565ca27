"""Every operation under one, two and three `jax.vmap`s."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._linalg import lapack, products
from pallas_kernels.attention import attention
from pallas_kernels.delta_rule import Operands, delta_chunk, delta_rule
from pallas_kernels.delta_rule.pallas_tpu import delta_rule_pallas_tpu
from pallas_kernels.mlp_memory import Rule, mlp_memory
from pallas_kernels.newton_schulz import newton_schulz
from pallas_kernels.selective_scan import selective_scan
from tests.kernels import test_delta_rule, test_mlp_memory
from tests.vmaps import check_vmaps

LENGTH, CHUNK = 21, 20  # longer than the blocks that the triangular inverse merges


def delta(i, *gates, batch=()):
    given = test_delta_rule.operands(
        np.random.default_rng(i), gates, length=LENGTH, n=4, m=3, batch=batch
    )
    return jax.tree.map(lambda a: np.asarray(a, np.float32), given)


def tokens_last(i):
    given = delta(i, "decay", "erase")
    for name in ("x", "error", "queries"):
        given[name] = given[name].swapaxes(-1, -2)
    return given


def mlp(i, **case):
    given = test_mlp_memory.operands(jnp.float32, batch=(), length=4, d=4, f=3, **case)
    del given["rule"]
    noise = np.random.default_rng(i)
    return jax.tree.map(lambda a: np.asarray(a * noise.uniform(0.8, 1.1), np.float32), given)


def scan(i):
    rng = np.random.default_rng(i)
    given = {
        "x": rng.normal(size=(2, 5, 3)),
        "step": rng.uniform(0.1, 1, size=(2, 5, 3)),
        "decay": -rng.uniform(0.1, 4, size=(3, 4)),
        "write": rng.normal(size=(2, 5, 4)),
        "read": rng.normal(size=(2, 5, 4)),
        "skip": rng.normal(size=3),
        "initial": rng.normal(size=(2, 3, 4)),
    }
    return {name: array.astype(np.float32) for name, array in given.items()}


def matrices(i, *shape):
    return np.random.default_rng(i).normal(size=shape).astype(np.float32)


def symmetric(i):
    a = matrices(i, 2, 5, 5)
    return a + a.swapaxes(-1, -2) + 4 * np.eye(5, dtype=np.float32)


def heads_share_keys(q):
    return attention(q, q[:, :, :2], q[:, ::-1, :2], implementation="xla")


def delta_case(gates, **more):
    def operation(given):
        return delta_rule(**given, **{"chunk_size": CHUNK, **more})

    return operation, lambda i: delta(i, *gates)


OPERATIONS = {
    "delta_rule of nothing but writes": delta_case(()),
    "delta_rule with erasure": delta_case(("erase",)),
    "delta_rule with decay and erasure": delta_case(("decay", "erase")),
    "delta_rule with everything": delta_case(("decay", "erase", "momentum"), read="running"),
    "delta_rule token by token": delta_case(("decay", "erase"), implementation="reference"),
    "delta_rule of a batch": (
        lambda given: delta_rule(**given, chunk_size=CHUNK),
        lambda i: delta(i, "erase", batch=(2, 1)),
    ),
    "delta_chunk": (lambda given: delta_chunk(**given), lambda i: delta(i, "decay", "erase")),
    "solve_unit_lower": (
        lambda given: products.solve_unit_lower(0.3 * given[0], given[1]),
        lambda i: (matrices(i, 20, 20), matrices(i + 99, 3, 20)),
    ),
    "mlp_memory self-modifying": (
        lambda given: mlp_memory(**given, chunk_size=4),
        lambda i: mlp(i, momentum=False),
    ),
    "mlp_memory with momentum": (
        lambda given: mlp_memory(**given, rule=Rule("dot", values="shared"), chunk_size=4),
        lambda i: mlp(i, readout=False, memories=1),
    ),
    "newton_schulz wide": (newton_schulz, lambda i: matrices(i, 2, 3, 4)),
    "newton_schulz tall": (
        lambda x: newton_schulz(x, variant="cubic"),
        lambda i: matrices(i, 4, 3),
    ),
    "selective_scan": (lambda given: selective_scan(**given, chunk_size=2), scan),
    "attention": (heads_share_keys, lambda i: matrices(i, 2, 5, 4, 8)),
    "lapack.solve": (lambda a: lapack.solve(a, a[..., :2] ** 2), symmetric),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_nested_vmaps_are_loops(name):
    operation, draw = OPERATIONS[name]
    check_vmaps(operation, draw, rtol=1e-3, atol=1e-4)


def test_nested_vmaps_of_factorizations_are_loops():
    """Products of two of their results, with as many leading axes, are what XLA got wrong."""

    def polar(x):
        u, _, vt = lapack.stacked(lambda one: tuple(jnp.linalg.svd(one, full_matrices=False)), x)
        return u @ vt, lapack.eigh(x)[0]

    check_vmaps(polar, symmetric, gradient=False, rtol=1e-3, atol=1e-4)


def test_nested_vmaps_of_a_kernel_are_loops():
    def kernel(given):
        form = functools.partial(delta_rule_pallas_tpu, read="running", chunk_size=4)
        return form(Operands(**given), interpret=True)

    check_vmaps(kernel, tokens_last, depths=(2,), rtol=1e-3, atol=1e-4)
