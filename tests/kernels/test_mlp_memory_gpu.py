"""The GPU kernel of the deep memory: interpreted on the CPU, lowered and compiled for Hopper.

See `test_delta_rule_gpu` for what the interpreter shows. What needs a GPU is marked `gpu`.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels._gpu.tiles import SMEM_LIMIT
from pallas_kernels.mlp_memory import Documents, Rule, api, mlp_memory, pallas_gpu
from pallas_kernels.mlp_memory.gpu_forward import Spec, shared_bytes
from pallas_kernels.mlp_memory.pallas_gpu import mlp_memory_pallas_gpu
from tests.kernels import gpu
from tests.kernels.test_mlp_memory import operands

D = 64  # features and hidden units


def arguments(*, dtype="float32", queries=True, readout=False, documents=False, **more):
    """Keyword arguments of `mlp_memory`, and the rule; the memory outlives a chunk.

    With documents the second chunk begins one, and so does the last.
    """
    sizes = {"batch": (1,), "memories": 5 if readout else 1, "length": D, "d": D, "f": D}
    sizes |= {"momentum": False} | more
    given = operands(jnp.float32, readout=readout, **sizes)
    if readout:
        biases = given["readout"].decay_bias + 2
        given["readout"] = given["readout"]._replace(decay_bias=biases)
    else:
        given["decay"] = 0.95 + 0.05 * given["decay"]
    if documents:
        chunks = jnp.arange(-(-sizes["length"] // D))
        begins = jnp.broadcast_to(
            (chunks == 1) | (chunks == chunks[-1]), (*sizes["batch"], chunks.size)
        )
        outer = given["initial"].outer
        given["documents"] = Documents(begins, 0.5 * outer.swapaxes(-1, -2), 2 * outer)
    for name in ("keys", "values", "queries"):
        given[name] = given[name].astype(dtype)
    return {name: a for name, a in given.items() if queries or name != "queries"}


def _weighted(array):
    """A sum whose cotangents do not depend on what is summed, which may be large."""
    weights = jnp.sin(jnp.arange(array.size, dtype=jnp.float32))
    return jnp.vdot(weights, array.astype(jnp.float32).ravel())


@functools.partial(jax.jit, static_argnames=("rule", "how"))
def _results(arrays, begins, rule, how):
    with jax.default_matmul_precision("highest"):
        of = jax.grad(api_call, has_aux=True)
        gradient, out = of(arrays, begins, rule=rule, how=how)
    return jax.tree.map(lambda a: a.astype(jnp.float32), (out, gradient))


def results(given, how):
    """The outputs, and the gradient with respect to every array."""
    arrays, begins = differentiable(given)
    return _results(arrays, begins, given["rule"], how)


def differentiable(given):
    """The arrays of a call that have a gradient, and where its documents begin."""
    arrays = {name: value for name, value in given.items() if name != "rule"}
    if "documents" not in arrays:
        return arrays, None
    begins = arrays["documents"].begins
    return arrays | {"documents": arrays["documents"]._replace(begins=None)}, begins


def api_call(arrays, begins=None, rule=None, chunk_size=D, how="pallas_gpu"):
    """A scalar of what a model calls, and the outputs."""
    if begins is not None:
        arrays = arrays | {"documents": arrays["documents"]._replace(begins=begins)}
    out = mlp_memory(**arrays, rule=rule, chunk_size=chunk_size, implementation=how)
    assert out.reads is None or out.reads.dtype == arrays["keys"].dtype
    assert out.final.inner.dtype == jnp.float32
    return sum(_weighted(leaf) for leaf in jax.tree.leaves(out)), out


@pytest.fixture
def interpreted(monkeypatch):
    """`implementation="pallas_gpu"` on a CPU; copies must not race."""
    options = InterpretGPUParams(detect_races=True)
    kernel = functools.partial(mlp_memory_pallas_gpu, interpret=options)
    monkeypatch.setitem(api._IMPLEMENTATIONS, "pallas_gpu", kernel)
    monkeypatch.setattr(pallas_gpu, "SMEM_LIMIT", 2**20)  # float32 with momentum, too
    interpreter.reset_gpu_interpret_mode_state()
    yield
    assert not interpreter.get_races().races_found


CASES = {
    "two chunks": {
        "rule": Rule(dgd="input_only", erase="implicit", inner_clip=0.3, read="running"),
        "length": 128,
        "dtype": "bfloat16",
    },
    "two memories at the anchor, two chunks and three tokens": {
        "rule": Rule("dot", "shared", erase="implicit", read="anchor"),
        "length": 131,
        "memories": 2,
        "documents": True,
    },
    "momentum, nothing erased": {"rule": Rule(dgd="none"), "momentum": True},
    "nothing erased, clipped or read": {
        "rule": Rule(dgd="functional", inner_clip=None),
        "queries": False,
    },
    "self-modifying, momentum, two chunks": {
        "rule": Rule(erase="implicit", read="running", max_learning_rate=0.5),
        "length": 128,
        "readout": True,
        "documents": True,
        "momentum": True,
    },
}


SLOW = [
    pytest.param(n, marks=pytest.mark.slow if c.get("readout") else ()) for n, c in CASES.items()
]


@pytest.mark.parametrize("case", SLOW)
def test_forward_and_backward_are_the_recurrence(case, interpreted):
    given = arguments(**CASES[case])
    found, expected = results(given, "pallas_gpu"), results(given, "reference")
    tolerance = gpu.TOLERANCE[CASES[case].get("dtype", "float32")]
    if CASES[case].get("readout"):  # the context's own products come on top, good to 2^-16
        tolerance *= 3
    gpu.assert_close(found, expected, tolerance, least=1e-3)
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(found))


HARD = {
    "decay 1e-4": lambda given: {"decay": jnp.full_like(given["decay"], 1e-4)},
    "decay 1, learning rate 0, zero keys": lambda given: {
        "decay": jnp.ones_like(given["decay"]),
        "learning_rate": jnp.zeros_like(given["learning_rate"]),
        "keys": jnp.zeros_like(given["keys"]),
    },
    "repeated keys, learning rate 1": lambda given: {
        "keys": jnp.broadcast_to(given["keys"][:, :1], given["keys"].shape),
        "learning_rate": jnp.ones_like(given["learning_rate"]),
    },
    "a large memory": lambda given: {"initial": jax.tree.map(lambda a: 100 * a, given["initial"])},
}


@pytest.mark.parametrize("case", HARD)
def test_hard_inputs(case, interpreted):
    given = arguments()
    given |= HARD[case](given)
    found, expected = results(given, "pallas_gpu"), results(given, "reference")
    gpu.assert_close(found, expected, 1e-4, least=1e-2)


def test_less_than_a_chunk_is_left_to_xla():
    given = arguments(length=3)
    gpu.assert_close(results(given, "pallas_gpu"), results(given, "xla"), 1e-6)


def shapes(**more):
    """Shapes of the arrays of a call, and of where its documents begin."""
    return differentiable(jax.eval_shape(lambda: arguments(**more) | {"rule": None}))


def test_a_state_is_stored_for_every_chunk_and_only_for_a_gradient():
    arrays, _ = shapes(batch=(3,), length=384, dtype="bfloat16", memories=2)
    stored = ("bf16[1,3,1,6,64,64]", "mlp_memory_forward")
    text = str(jax.make_jaxpr(jax.grad(api_call, has_aux=True))(arrays))
    assert all(name in text for name in (*stored, "mlp_memory_backward"))
    assert stored[0] not in str(jax.make_jaxpr(api_call)(arrays))


def refusal(**changes):
    """Evaluate the shapes of a call that is refused."""
    options = {name: changes.pop(name) for name in ("chunk_size",) if name in changes}
    given = operands(jnp.float32, **{"momentum": False, "readout": False, "d": D, "f": D} | changes)
    rule = given.pop("rule")
    jax.eval_shape(functools.partial(api_call, rule=rule, **options), given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"readout": True, "memories": 6, "rule": Rule(adaptive_query=True)}, "no queries"),
        ({"momentum": True}, "float32 tokens without momentum only: with it 365568 bytes"),
        ({"chunk_size": 32}, "solves chunks of 64 tokens, a warpgroup's tile, not 32"),
        ({"f": 128}, "64 x 64, not 128 x 64: these take 458752 of a block's 232448"),
    ],
)
def test_what_the_kernel_does_not_take(changes, message):
    with pytest.raises(NotImplementedError, match=message):
        refusal(**changes)


def test_float64_is_refused(x64):
    given = operands(jnp.float64, momentum=False, readout=False, d=D, f=D)
    with pytest.raises(NotImplementedError, match="takes bfloat16 or float32, not float64"):
        mlp_memory(**given, chunk_size=D, implementation="pallas_gpu")


@pytest.mark.parametrize(("parts", "needed"), [(1, 117_760), (2, SMEM_LIMIT)])
def test_shared_memory_is_estimated(parts, needed):
    """In float32 nothing is left of it."""
    assert shared_bytes(Spec(parts, Rule(), "running"), backward=True) == needed
    assert 2 * shared_bytes(Spec(1, Rule(), "running"), backward=False) <= SMEM_LIMIT


def workload(dtype, **more):
    """One layer: batch 8, 16 heads."""
    return shapes(batch=(8, 16), length=512, dtype=dtype, **more)


def test_lowers_for_cuda():
    """The forward pass; `test_compiles_ahead_of_time` has the backward one."""
    text = gpu.lowered(api_call, *workload("bfloat16"))
    assert "mlp_memory_forward" in text and text.count("custom_call @mosaic_gpu_v2") == 1


# bytes that the forward and the backward kernel spill, and some more: to notice one that outgrows
# the registers further
SPILLED = {
    ("mlp_memory", "bfloat16"): (700, 2800),
    ("mlp_memory", "float32"): (1500, 4200),
    ("mlp_memory with momentum", "bfloat16"): (2600, 6800),
    ("self_modifying", "bfloat16"): (1100, 4000),
    ("self_modifying", "float32"): (1900, 5000),
    ("self_modifying with momentum", "bfloat16"): (3200, 8000),
}


@pytest.mark.gpu_compile
@pytest.mark.parametrize(("kernel", "dtype"), SPILLED)
def test_compiles_ahead_of_time(kernel, dtype, capfd, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    limits = SPILLED[kernel, dtype]
    kernel, momentum = kernel.split()[0], kernel.endswith("momentum")
    given = workload(dtype, readout=kernel == "self_modifying", momentum=momentum)
    text = gpu.compiled(jax.grad(api_call, has_aux=True), *given).as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 2
    found = gpu.assembled("".join(capfd.readouterr()))
    names = (f"{kernel}_forward", f"{kernel}_backward")
    assert set(found) == set(names)
    assert all(found[n]["spilled"] <= most for n, most in zip(names, limits, strict=True)), found


@pytest.mark.gpu_compile
@pytest.mark.parametrize("readout", [False, True])
def test_documents_compile_ahead_of_time(readout):
    """What is spilled for them is of use where one begins only."""
    given = workload("bfloat16", readout=readout, documents=True)
    text = gpu.compiled(jax.grad(api_call, has_aux=True), *given).as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 2


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["plain", *CASES, *HARD])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu(case, dtype):
    """2,048 tokens, forward and backward, against the recurrence."""
    gpu.required()
    if dtype == "float32" and CASES.get(case, {}).get("momentum"):
        pytest.skip("float32 tokens with momentum do not fit the shared memory")
    given = arguments(**CASES.get(case, {}) | {"batch": (2,), "length": 2048, "dtype": dtype})
    given |= HARD.get(case, lambda given: {})(given)
    found, expected = results(given, "pallas_gpu"), results(given, "reference")
    gpu.assert_close(found[0], expected[0], gpu.TOLERANCE[dtype])
    gpu.assert_close(found[1], expected[1], 3 * gpu.TOLERANCE[dtype])
