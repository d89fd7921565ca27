"""The TPU kernel of the delta rule: interpreted on the CPU, and compiled for every TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._tpu.vmem import save_every, vmem_limit_of
from pallas_kernels.delta_rule import Operands, delta_chunk, delta_rule
from pallas_kernels.delta_rule.pallas_tpu import delta_rule_pallas_tpu
from pallas_kernels.delta_rule.reference import delta_rule_reference
from tests.kernels import tpu

GATES = [("decay", "erase", "momentum"), ("decay", "erase"), ("momentum",), ()]


def operands(gates, *, batch=(2,), length=11, rows=3, columns=4, queries=True):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def gate(name):
        return jnp.asarray(rng.uniform(0.3, 0.9, (*batch, length)), jnp.float32)

    x = normal(*batch, columns, length)
    given = Operands(
        x=x / jnp.linalg.norm(x, axis=-2, keepdims=True),
        error=normal(*batch, rows, length),
        learning_rate=gate("learning_rate"),
        initial=normal(*batch, rows, columns),
        **{name: gate(name) for name in gates},
    )
    if "momentum" in gates:
        given = given._replace(initial_momentum=normal(*batch, rows, columns))
    return given._replace(queries=normal(*batch, columns, length) if queries else None)


def total(form, given):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(form(given)))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("read", ["running_prev", "running", "anchor"])
@pytest.mark.parametrize("every", [1, 2])
def test_forward_and_backward_are_the_recurrence(gates, read, every):
    """Two whole chunks of 4 and a rest of 3; a state stored for each chunk, or for two."""
    kernel = functools.partial(
        delta_rule_pallas_tpu, read=read, chunk_size=4, every=every, interpret=True
    )
    reference = functools.partial(delta_rule_reference, read=read)
    given = operands(gates)
    found, expected = (jax.jit(form)(given) for form in (kernel, reference))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    found, expected = (
        jax.jit(jax.grad(functools.partial(total, form)))(given) for form in (kernel, reference)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("every", [1, 2])
def test_the_kernels_run_and_keep_one_state_for_every_so_many_chunks(every):
    given = operands(GATES[0], length=16, columns=6)
    kernel = functools.partial(
        delta_rule_pallas_tpu, read="running_prev", chunk_size=4, every=every, interpret=True
    )
    text = str(jax.make_jaxpr(jax.grad(functools.partial(total, kernel)))(given))
    assert "delta_rule_forward" in text and "delta_rule_backward" in text
    found = [f"f32[2,{blocks},3,6]" in text for blocks in (4, 2)]  # [sequences, states, ...]
    assert found == [every == 1, every == 2]


def test_states_are_stored_as_often_as_vmem_asks_for():
    state = {"initial": jax.ShapeDtypeStruct((7, 5, 64, 64), jnp.float32)}  # 160 KiB in tiles
    assert [save_every(state, n, 2 * 2**20) for n in (64, 12, 7, 1)] == [8, 6, 7, 1]
    assert save_every(state, 64, 3 * 2**17) == 2 and save_every(state, 64, -(2**20)) == 1


def test_memories_that_share_keys_and_no_queries():
    given = operands(GATES[1], queries=False)
    many = jnp.stack([given.initial, 2 * given.initial], axis=1)
    shared = jax.tree.map(lambda a: a[:, None], given)._replace(initial=many)
    kernel = functools.partial(
        delta_rule_pallas_tpu, read="running_prev", chunk_size=4, interpret=True
    )
    out = kernel(shared)
    assert out.reads is None
    for i in range(2):
        alone = delta_rule_reference(given._replace(initial=many[:, i]), read="running_prev")
        np.testing.assert_allclose(out.final[:, i], alone.final, atol=2e-5)


def test_one_chunk_by_itself_has_no_kernel():
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="delta_chunk has no implementation='pallas_tpu'"):
        delta_chunk(x, x, jnp.ones(4), initial=jnp.eye(2), implementation="pallas_tpu")


def test_float64_is_refused(x64):
    with pytest.raises(NotImplementedError, match="keeps its state in float32, not float64"):
        x = jnp.ones((4, 2))
        delta_rule(x, x, jnp.ones(4), initial=jnp.eye(2), implementation="pallas_tpu")


@pytest.mark.tpu_compile
@pytest.mark.parametrize("generation", tpu.TPUS)
@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_compiles_ahead_of_time(generation, chunk):
    """One layer of the 340M preset: 16 heads of 64 features, forward and backward."""
    limit = vmem_limit_of(tpu.TPUS[generation].kind)
    kernel = functools.partial(
        delta_rule_pallas_tpu, read="running_prev", chunk_size=chunk, vmem_limit=limit
    )
    shapes = jax.eval_shape(
        lambda: operands(GATES[0], batch=(16,), length=512, rows=64, columns=64)
    )
    text = tpu.compiled_tree(
        jax.value_and_grad(functools.partial(total, kernel)), generation, shapes
    ).as_text()
    assert text.count("tpu_custom_call") >= 2
