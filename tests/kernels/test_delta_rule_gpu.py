"""The GPU kernel of the delta rule: interpreted on the CPU, lowered and compiled for Hopper.

Mosaic GPU's interpreter runs the kernel's copies, barriers, shared memory and control flow; the
products of its tiles are jnp's there (see `pallas_kernels._gpu.tiles`). What needs a GPU is marked
`gpu`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels._gpu.tiles import SMEM_LIMIT
from pallas_kernels.delta_rule import Operands, delta_chunk, delta_rule
from pallas_kernels.delta_rule.gpu_forward import Spec, shared_bytes
from pallas_kernels.delta_rule.pallas_gpu import delta_rule_pallas_gpu
from pallas_kernels.delta_rule.reference import delta_rule_reference
from tests.kernels import gpu

BOTH = ("decay", "erase")


def operands(gates, *, batch=(1,), length=64, rows=64, columns=64, dtype="float32", queries=True):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype).astype(jnp.float32)

    def gate(low, high):
        return jnp.asarray(rng.uniform(low, high, (*batch, length)), jnp.float32)

    given = Operands(
        x=normal(*batch, columns, length) / columns**0.5,
        error=normal(*batch, rows, length),
        learning_rate=gate(0.1, 0.9),
        initial=jnp.asarray(rng.normal(size=(*batch, rows, columns)), jnp.float32),
        **{name: gate(0.3 if name == "erase" else 0.8, 0.99) for name in gates},
    )
    x = given.x.astype(dtype).astype(jnp.float32)
    return given._replace(x=x, queries=normal(*batch, columns, length) if queries else None)


def interpreted(read, dtype="float32", **options):
    return functools.partial(
        delta_rule_pallas_gpu,
        read=read,
        chunk_size=64,
        dtype=jnp.dtype(dtype),
        interpret=InterpretGPUParams(**options.pop("interpreter", {})),
        **options,
    )


def total(form, given):
    """A scalar, and what it is made of."""
    out = form(given)
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out


def with_gradient(form):
    return jax.jit(jax.value_and_grad(functools.partial(total, form), has_aux=True))


CASES = {
    "two chunks of one block and three tokens": ("running_prev", BOTH, {"length": 131}, 2),
    "two blocks of rows": ("running", BOTH, {"length": 128, "rows": 128, "dtype": "bfloat16"}, 1),
    "no gates": ("running", (), {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_the_recurrence(case):
    read, gates, sizes, every = CASES[case]
    given, dtype = operands(gates, **sizes), sizes.get("dtype", "float32")
    (_, out), gradient = with_gradient(interpreted(read, dtype, every=every))(given)
    reference = functools.partial(delta_rule_reference, read=read)
    (_, expected), of_reference = with_gradient(reference)(given)
    gpu.assert_close((out, gradient), (expected, of_reference), gpu.TOLERANCE[dtype])
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(gradient))


HARD = {
    "decay 1e-4": lambda g: {"decay": jnp.full_like(g.learning_rate, 1e-4)},
    "decay 1, learning rate 0, zero keys": lambda g: {
        "decay": jnp.ones_like(g.learning_rate),
        "learning_rate": jnp.zeros_like(g.learning_rate),
        "x": jnp.zeros_like(g.x),
    },
    "repeated keys, erased in full": lambda g: {
        "decay": jnp.ones_like(g.learning_rate),
        "erase": jnp.ones_like(g.learning_rate),
        "learning_rate": jnp.ones_like(g.learning_rate),
        "x": jnp.broadcast_to(g.x[..., :1], g.x.shape),
    },
}


@functools.cache
def on_hard_inputs():
    """Compiled once for all cases."""
    reference = functools.partial(delta_rule_reference, read="running_prev")
    return with_gradient(interpreted("running_prev")), with_gradient(reference)


@pytest.mark.parametrize("case", HARD)
def test_hard_inputs(case):
    given = operands(BOTH)
    unit = given.x / jnp.linalg.norm(given.x, axis=-2, keepdims=True)
    given = given._replace(x=unit)
    given = given._replace(**HARD[case](given))
    (found, expected) = (form(given) for form in on_hard_inputs())
    gpu.assert_close(found[0][1], expected[0][1], 1e-4)
    gpu.assert_close(found[1], expected[1], 1e-3)


def test_no_races_and_no_reads_and_keys_that_memories_share():
    given = operands(("erase",), length=128, queries=False)
    shared = given._replace(initial=jnp.concatenate([given.initial, 2 * given.initial]))
    interpreter.reset_gpu_interpret_mode_state()
    form = interpreted("running", interpreter={"detect_races": True})
    found = jax.jit(form)(shared)
    assert not interpreter.get_races().races_found
    assert found.reads is None
    gpu.assert_close(found, delta_rule_reference(shared, read="running"), 1e-4)


def test_reads_at_the_anchor_and_less_than_a_chunk():
    """Nothing is left for the kernel: XLA runs the tokens beyond the last whole chunk."""
    given = operands(BOTH, length=3)
    found = interpreted("anchor")(given)
    gpu.assert_close(found, delta_rule_reference(given, read="anchor"), 1e-4)


def test_one_state_is_stored_for_every_so_many_chunks():
    given = jax.eval_shape(lambda: operands(BOTH, batch=(3,), length=384, dtype="bfloat16"))
    for every in (1, 2, 3):
        form = functools.partial(
            delta_rule_pallas_gpu,
            read="running",
            chunk_size=64,
            dtype=jnp.dtype("bfloat16"),
            every=every,
        )
        text = str(jax.make_jaxpr(jax.grad(lambda g, f=form: total(f, g)[0]))(given))
        assert "delta_rule_forward" in text and "delta_rule_backward" in text
        stored = [f"bf16[1,3,{blocks},1,64,64]" in text for blocks in (6, 3, 2)]
        assert stored == [every == 1, every == 2, every == 3]


def call(**changes):
    sizes = {"length": 64, "rows": 64, "columns": 64, "dtype": jnp.bfloat16} | changes
    length, rows, columns, dtype = (
        sizes.pop(name) for name in ("length", "rows", "columns", "dtype")
    )
    given = {
        "x": jnp.ones((length, columns), dtype),
        "error": jnp.ones((length, rows), dtype),
        "learning_rate": jnp.ones(length),
        "erase": jnp.ones(length),
        "queries": jnp.ones((length, columns), dtype),
        "initial": jnp.zeros((rows, columns)),
    }
    return jax.eval_shape(
        lambda given: delta_rule(**given, **sizes, implementation="pallas_gpu"), given
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": jnp.ones(64)}, "the GPU kernel has no momentum"),
        ({"chunk_size": 32}, "solves chunks of 64 tokens, a warpgroup's tile, not 32"),
        ({"rows": 32}, "64 k x 64 or 64 k x 128, not 32 x 64"),
        ({"columns": 256}, "64 k x 64 or 64 k x 128, not 64 x 256"),
        ({"dtype": jnp.float32, "columns": 128}, "bytes of shared memory for a float32 memory of"),
    ],
)
def test_what_the_kernel_does_not_take(changes, message):
    with pytest.raises(NotImplementedError, match=message):
        call(**changes)


def test_float64_and_single_chunks_are_refused(x64):
    with pytest.raises(NotImplementedError, match="takes bfloat16 or float32, not float64"):
        call(dtype=jnp.float64)
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="delta_chunk has no implementation='pallas_gpu'"):
        delta_chunk(x, x, jnp.ones(4), initial=jnp.eye(2), implementation="pallas_gpu")


def test_a_number_of_chunks_that_does_not_divide():
    with pytest.raises(ValueError, match="every=2 must divide the 3 chunks"):
        interpreted("running", every=2)(operands((), length=192))


def test_shared_memory_is_estimated():
    """141,336 bytes is what Mosaic GPU asks for; two blocks of 64 columns fit an SM."""
    spec = Spec(1, True, True, "running", 1)
    assert 141_336 <= shared_bytes(spec, 128, slots=1, backward=True) < 143_000
    assert 2 * shared_bytes(spec, 64, slots=1, backward=True) <= SMEM_LIMIT


def api(given):
    """What a model calls, tokens first, in bfloat16."""
    given = given._asdict()
    given.pop("anchored")
    for name in ("x", "error", "queries"):
        given[name] = jnp.swapaxes(given[name], -1, -2).astype(jnp.bfloat16)
    given = {name: array for name, array in given.items() if array is not None}
    out = delta_rule(**given, implementation="pallas_gpu")
    assert out.reads.dtype == jnp.bfloat16 and out.final.dtype == jnp.float32
    return jnp.sum(out.reads.astype(jnp.float32)) + jnp.sum(out.final)


def workload(size):
    """One layer: batch 8, 16 heads."""
    sizes = {"batch": (8, 16), "length": 512, "rows": size, "columns": size}
    return jax.eval_shape(lambda: operands(BOTH, **sizes))


def test_lowers_for_cuda():
    """The forward pass; `test_compiles_ahead_of_time` has the backward one."""
    text = gpu.lowered(api, workload(128))
    assert "delta_rule_forward" in text and text.count("custom_call @mosaic_gpu_v2") == 1


@pytest.mark.gpu_compile
@pytest.mark.parametrize("size", [64, 128])
def test_compiles_ahead_of_time(size, capfd, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    text = gpu.compiled(jax.grad(api), workload(size)).as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 2
    found = gpu.assembled("".join(capfd.readouterr()))
    assert set(found) == {"delta_rule_forward", "delta_rule_backward"}
    # so that a kernel that outgrows the registers further is noticed
    limits = {"delta_rule_forward": 400, "delta_rule_backward": 2400}
    assert all(kernel["spilled"] <= limits[name] for name, kernel in found.items()), found


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["plain", *HARD])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu(case, dtype):
    """4,096 tokens, forward and backward, against the recurrence; the final state, too."""
    gpu.required()
    given = operands(BOTH, batch=(2,), length=4096, rows=128, columns=64, dtype=dtype)
    given = given._replace(
        learning_rate=given.learning_rate / 64,
        x=given.x / jnp.linalg.norm(given.x, axis=-2, keepdims=True),
    )
    if case != "plain":
        given = given._replace(**HARD[case](given))
    kernel = functools.partial(
        delta_rule_pallas_gpu, read="running_prev", chunk_size=64, dtype=jnp.dtype(dtype)
    )
    reference = functools.partial(delta_rule_reference, read="running_prev")
    with jax.default_matmul_precision("highest"):
        found, expected = (with_gradient(form)(given) for form in (kernel, reference))
    gpu.assert_close(found[0][1], expected[0][1], gpu.TOLERANCE[dtype])
    gpu.assert_close(found[1], expected[1], 3 * gpu.TOLERANCE[dtype])
