"""Every form of the deep memory against its token recurrence, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._tpu import vmem
from pallas_kernels._tpu.vmem import vmem_limit_of
from pallas_kernels.mlp_memory import (
    CHOICES,
    Documents,
    FastWeights,
    Readout,
    Rule,
    Tokens,
    mlp_memory,
)
from pallas_kernels.mlp_memory.pallas_tpu import mlp_memory_pallas_tpu
from pallas_kernels.workloads import PRESETS
from tests.kernels import tpu

D, F, LENGTH, CHUNK = 6, 7, 11, 4  # two whole chunks and a rest of three

CASES = {
    "self-modifying": dict(),
    "adaptive query": dict(
        memories=6,
        momentum=False,
        rule=Rule(adaptive_query=True, dgd="input_only", max_learning_rate=0.5),
    ),
    "given context": dict(
        readout=False,
        documents=True,
        memories=2,
        rule=Rule("dot", erase="implicit", read="running"),
    ),
    "one memory": dict(
        readout=False,
        memories=1,
        momentum=False,
        rule=Rule(values="shared", dgd="functional", read="anchor", inner_clip=None),
    ),
}

DELTA = Rule("delta", dgd="none", targets="unit", inner_clip=None, gate_gain=2.0)
MENU = {
    "U by the delta rule": dict(
        momentum=False,
        rule=DELTA._replace(written="outer", step="normalised", decay_to="start", read="running"),
    ),
    "U by the delta rule, in documents": dict(
        readout=False,
        documents=True,
        rule=DELTA._replace(written="outer", values="shared"),
    ),
    "both by the delta rule": dict(
        rule=DELTA._replace(dgd="input_only", step="normalised", clip="error", inner_clip=0.5)
    ),
    "decay to the start": dict(momentum=False, rule=Rule(decay_to="start", clip="gradient")),
    "erasing U alone": dict(rule=Rule(dgd="output_only", erase="implicit")),
    "linear": dict(
        linear=True,
        momentum=False,
        rule=DELTA._replace(residual=False, decay_to="start", read="running"),
    ),
    "linear, with a residual": dict(linear=True, rule=Rule(targets="unit", dgd="none")),
    "linear, in documents": dict(
        linear=True, readout=False, documents=True, rule=Rule("dot", residual=False)
    ),
    "linear, read at the start": dict(linear=True, rule=DELTA._replace(read="anchor")),
    "static": dict(rule=Rule(static=(0, 2), silent=(1, 4))),
    "static and linear": dict(linear=True, rule=DELTA._replace(static=(4,), silent=(3,))),
    "all static": dict(rule=Rule(static=(0, 1, 2, 3, 4), read="running")),
}


def test_the_tables_hold_every_choice_of_the_menu():
    rules = [case.get("rule", Rule()) for case in (*CASES.values(), *MENU.values())]
    for name, choices in CHOICES.items():
        assert {getattr(rule, name) for rule in rules} == set(choices), name


def operands(dtype, *, batch=(2,), memories=5, length=LENGTH, momentum=True, readout=True, **more):
    """The keyword arguments of `mlp_memory`."""
    d, f, rule = more.get("d", D), more.get("f", F), more.get("rule", Rule())
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    def gate(least):
        return jnp.asarray(rng.uniform(least, 0.9, (*batch, length)), dtype)

    inner = normal(*batch, memories, f, d, scale=d**-0.5)
    outer = normal(*batch, memories, d, f, scale=0.3 * f**-0.5)
    if more.get("linear"):
        inner, outer = None, normal(*batch, memories, d, d, scale=d**-0.5)
    momenta = (None, None)
    if momentum:
        momenta = (None if inner is None else 0.1 * inner, -0.1 * outer)
    given = {name: normal(*batch, length, d, scale=d**-0.5) for name in ("keys", "values")}
    given |= dict(queries=normal(*batch, length, d), initial=FastWeights(inner, outer, *momenta))
    if momentum:
        given["momentum"] = gate(0.1)
    if readout:
        of_learning_rate, of_decay = normal(*batch, d), normal(*batch, d)
        given["readout"] = Readout(
            of_learning_rate, of_decay, normal(*batch) - 2, normal(*batch) + 3
        )
    else:
        given |= dict(learning_rate=0.3 * gate(0.1), decay=gate(0.5))
    if more.get("documents"):  # the second chunk begins one in one sequence, the rest in the other
        begins = jnp.array([[False, True, False], [False, False, True]])
        anew = None if inner is None else 0.5 * outer.swapaxes(-1, -2)
        given["documents"] = Documents(begins, anew, 2 * outer)
    if more.get("rule", Rule()).decay_to == "start":
        given["start"] = jax.tree.map(lambda a: 0.7 * a + 0.1, given["initial"])
    return given | dict(rule=rule)


@functools.partial(jax.jit, static_argnames=("rule", "how"))
def _results(arrays, begins, rule, how):
    def total(arrays):
        if begins is not None:
            arrays = arrays | dict(documents=arrays["documents"]._replace(begins=begins))
        out = mlp_memory(**arrays, rule=rule, chunk_size=CHUNK, implementation=how)
        leaves = (leaf.astype(out.final.outer.dtype) for leaf in jax.tree.leaves(out))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves), out

    return jax.grad(total, has_aux=True)(arrays)


def results(given, how):
    """The gradient with respect to every array, and the outputs."""
    arrays, begins = {name: value for name, value in given.items() if name != "rule"}, None
    if "documents" in given:
        begins = given["documents"].begins
        arrays["documents"] = given["documents"]._replace(begins=None)
    return _results(arrays, begins, given["rule"], how)


def close(found, expected, tolerance, atol=None):
    atol = tolerance if atol is None else atol
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol, err_msg=name)


@pytest.fixture
def interpreted(monkeypatch):
    """`implementation="pallas_tpu"` on a CPU."""
    from pallas_kernels.mlp_memory import api

    kernel = functools.partial(mlp_memory_pallas_tpu, interpret=True)
    monkeypatch.setitem(api._IMPLEMENTATIONS, "pallas_tpu", kernel)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_form_is_the_recurrence(case, interpreted):
    """In float64 where it runs in float64; forward and the gradient of every array."""
    with jax.enable_x64(True):
        given = operands(jnp.float64, **case)
        expected = results(given, "reference")
        close(results(given, "xla"), expected, 1e-10)
        expected = jax.tree.map(lambda a: a.astype(jnp.float32), expected)
    close(results(operands(jnp.float32, **case), "pallas_tpu"), expected, 2e-4)


@pytest.mark.parametrize("case", MENU.values(), ids=MENU)
def test_the_menu_is_the_recurrence(case):
    """What no kernel has; in float64, forward and the gradient of every array."""
    with jax.enable_x64(True):
        given = operands(jnp.float64, **case)
        close(results(given, "xla"), results(given, "reference"), 1e-10)
        with pytest.raises(NotImplementedError, match="use implementation='xla'"):
            mlp_memory(**given, chunk_size=CHUNK, implementation="pallas_tpu")


HARD = {
    "decay 1e-4": lambda given: dict(decay=jnp.full_like(given["decay"], 1e-4)),
    "decay 1": lambda given: dict(decay=jnp.ones_like(given["decay"])),
    "learning rate 0": lambda given: dict(learning_rate=jnp.zeros_like(given["learning_rate"])),
    "learning rate 1": lambda given: dict(learning_rate=jnp.ones_like(given["learning_rate"])),
    "repeated keys": lambda given: dict(keys=jnp.ones_like(given["keys"])),
    "zero keys": lambda given: dict(keys=jnp.zeros_like(given["keys"])),
    "momentum 1e-4": lambda given: dict(momentum=jnp.full_like(given["momentum"], 1e-4)),
    "a large memory": lambda given: dict(initial=jax.tree.map(lambda a: 100 * a, given["initial"])),
}


def test_hard_inputs(interpreted):
    """Also a memory that is a hundred times too large: gradients stay finite and right."""
    for name in HARD:
        given = operands(jnp.float32, readout=False, memories=1, length=12)
        given |= HARD[name](given)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda a: a.astype(jnp.float64), given | dict(rule=None))
            expected = jax.tree.map(
                np.asarray, results(wide | dict(rule=given["rule"]), "reference")
            )
        scale = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
        for how in ("xla", "pallas_tpu"):
            found = results(given, how)
            assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(found)), name
            close(found, expected, 2e-4, atol=2e-4 * scale)


@pytest.mark.parametrize("how", ["xla", "reference"])
def test_a_large_memory_is_written_no_faster(how):
    """One token moves each matrix by at most learning_rate * inner_clip, however large both are."""
    given = operands(jnp.float32, memories=1, length=1, momentum=False, readout=False)
    start = jax.tree.map(lambda a: 100 * a, given["initial"])
    given |= dict(initial=start, decay=jnp.ones((2, 1)), learning_rate=jnp.full((2, 1), 0.5))
    moved = []
    for clip in (1.0, None):
        given["rule"] = Rule(dgd="none", inner_clip=clip)
        final = mlp_memory(**given, chunk_size=1, implementation=how).final
        moved.append([jnp.linalg.norm(final[i] - start[i], axis=(-2, -1)) for i in (0, 1)])
    assert all(float(jnp.max(size)) < 0.5 + 1e-3 for size in moved[0])
    assert all(float(jnp.min(size)) > 5 for size in moved[1])  # unbounded it is far more


def test_bfloat16_tokens_are_read_as_they_are(interpreted):
    given = operands(jnp.float32, memories=1, readout=False)
    names = ("keys", "values", "queries", "momentum", "learning_rate", "decay")
    given |= {name: given[name].astype(jnp.bfloat16) for name in names}
    (gradient, found), (_, expected) = (results(given, how) for how in ("pallas_tpu", "xla"))
    assert found.reads.dtype == jnp.bfloat16 and found.final.inner.dtype == jnp.float32
    assert all(gradient[name].dtype == jnp.bfloat16 for name in names)
    close(found.final, expected.final, 1e-5)
    rule = given.pop("rule")

    def forward(given):
        return mlp_memory(**given, rule=rule, chunk_size=CHUNK, implementation="pallas_tpu")

    text = str(jax.make_jaxpr(forward)(given))
    kernel = text[text.index("pallas_call") :]
    assert kernel.count(f"{{bf16[2,2,{CHUNK},{D}]}}") >= 3  # keys, values, queries
    assert kernel.count(f"{{bf16[2,2,1,{CHUNK}]}}") >= 3  # learning rate, decay, momentum


def gradients(given, **options):
    """Outputs and gradients of the kernel itself, of sequences as rows."""
    rule = given.pop("rule")
    last = functools.partial(jnp.swapaxes, axis1=-1, axis2=-2)

    def total(arrays):
        tokens = (last(arrays[name]) for name in ("queries", "keys", "values"))
        gates = (arrays.get(name) for name in ("learning_rate", "decay", "momentum"))
        run = functools.partial(mlp_memory_pallas_tpu, rule=rule, chunk_size=CHUNK, **options)
        out = run(arrays["initial"], Tokens(*tokens, *gates), arrays.get("readout"), interpret=True)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

    return jax.jit(jax.grad(total, has_aux=True))(given)


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("every", [1, 2])
def test_sequences_of_a_step_need_not_divide_them(sequences, every):
    """Three sequences, two a step: the last step takes one."""
    case = dict(batch=(3,), length=4 * CHUNK, memories=1, readout=False)
    with jax.enable_x64(True):
        expected = results(operands(jnp.float64, **case), "reference")
        expected = jax.tree.map(lambda a: a.astype(jnp.float32), expected)
    gradient, (reads, final) = gradients(
        operands(jnp.float32, **case), sequences=sequences, every=every
    )
    found = gradient, expected[1]._replace(reads=jnp.swapaxes(reads, -1, -2), final=final)
    close(found, expected, 2e-4)


def test_rounded_products_are_those_of_bfloat16():
    """Far from float32's 2e-4, and within what eight bits of a hundred products leave."""
    case = dict(length=4 * CHUNK, memories=1, readout=False)
    exact, rounded = (
        gradients(operands(jnp.float32, **case), rounded=rounded)[1] for rounded in (False, True)
    )
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        difference = float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        assert 1e-4 < difference < 2e-2


def test_stored_states_take_no_more_than_their_share():
    state = jax.ShapeDtypeStruct((128, 1, 512, 128), jnp.float32)  # 32 MiB for each chunk
    assert [vmem.least_every(state, n) for n in (8, 32, 64, 1)] == [1, 2, 4, 1]
    assert vmem.least_every(jax.ShapeDtypeStruct((128, 8, 1024, 256), jnp.float32), 6) == 6


def test_the_kernels_run_and_keep_one_state_for_eight_chunks(interpreted, monkeypatch):
    monkeypatch.setitem(vmem.VMEM, jax.devices()[0].device_kind, 128 * vmem.MIB)
    given = operands(jnp.float32, length=16 * CHUNK)
    rule = given.pop("rule")

    def total(given):
        out = mlp_memory(**given, rule=rule, chunk_size=CHUNK, implementation="pallas_tpu")
        return jnp.sum(out.reads)

    text = str(jax.make_jaxpr(jax.grad(total))(given))
    assert "mlp_memory_forward" in text and "mlp_memory_backward" in text
    assert f"f32[2,2,5,{F},{D}]" in text  # two states for sixteen chunks
    assert f"f32[2,16,5,{F},{D}]" not in text


def test_mistakes_are_named(x64):
    given = operands(jnp.float64)
    rest = {name: value for name, value in given.items() if name != "readout"}
    refused = [
        (given | dict(implementation="cuda"), "implementation='cuda' is not one of reference"),
        (given | dict(rule=Rule(read="now")), "read='now' is not one of running_prev"),
        (given | dict(chunk_size=0), "chunk_size=0 must be an integer, at least 1"),
        (given | dict(learning_rate=given["momentum"]), "a readout makes learning_rate"),
        (rest, "learning_rate and decay are missing"),
        (given | dict(queries=None), "5 memories and queries, got 5 memories and queries=None"),
        (given | dict(momentum=None), "momentum and the momenta of `initial` together"),
        (given | dict(values=given["values"][:, :3]), "values has shape"),
        (
            given | dict(documents=Documents(jnp.zeros((2, 2), bool), *given["initial"][:2])),
            r"documents.begins has shape \(2, 2\), expected \(2, 1\)",
        ),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            mlp_memory(**arguments)
    with pytest.raises(NotImplementedError, match="keeps its state in float32, not float64"):
        mlp_memory(**given, implementation="pallas_tpu")


SMALL = (("340m", 16), ("340m", 64))  # what fits the 16 MiB of a v4


@pytest.mark.tpu_compile
@pytest.mark.parametrize("generation", tpu.TPUS)
@pytest.mark.parametrize("workload", PRESETS)
@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_compiles_ahead_of_time(generation, workload, chunk):
    heads, d, f = PRESETS[workload]
    limit = vmem_limit_of(tpu.TPUS[generation].kind)
    if generation == "v4" and (workload, chunk) not in SMALL:
        with pytest.raises(NotImplementedError, match="MiB of VMEM, more than 14"):
            compiled(generation, heads, d, f, chunk, limit)
        return
    text = compiled(generation, heads, d, f, chunk, limit).as_text()
    assert text.count("tpu_custom_call") >= 2


def compiled(generation, heads, d, f, chunk, limit, length=512):
    """Forward and backward of five memories with momentum, from bfloat16 inputs."""

    def total(given):
        last = functools.partial(jnp.swapaxes, axis1=-1, axis2=-2)
        tokens = (last(given[name]) for name in ("queries", "keys", "values"))
        tokens = Tokens(*tokens, None, None, given["momentum"])
        start, readout = given["initial"], given["readout"]
        run = functools.partial(mlp_memory_pallas_tpu, rule=Rule(), chunk_size=chunk)
        rounded = vmem.rounds_products(tpu.TPUS[generation].kind)
        reads, final = run(start, tokens, readout, vmem_limit=limit, rounded=rounded)
        leaves = [reads.astype(jnp.float32), *jax.tree.leaves(final)]
        return sum(jnp.sum(leaf**2) for leaf in leaves)

    options = dict(batch=(heads,), length=length, d=d, f=f)
    shapes = jax.eval_shape(lambda: operands(jnp.float32, **options) | dict(rule=None))
    shapes.pop("rule")
    for name in ("queries", "keys", "values", "momentum"):
        shapes[name] = jax.ShapeDtypeStruct(shapes[name].shape, jnp.bfloat16)
    return tpu.compiled_tree(jax.value_and_grad(total), generation, shapes)
