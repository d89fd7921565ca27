"""Attention: every backend that runs here against a numpy loop, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels.attention import api, attention, default_implementation
from pallas_kernels.attention.cudnn import attention_cudnn
from pallas_kernels.attention.pallas_tpu import attention_pallas_tpu
from tests.kernels import tpu

BATCH, LENGTH, TOTAL, HEADS, GROUPS, DIM = 2, 10, 14, 4, 2, 8


@pytest.fixture
def splash(monkeypatch):
    """The TPU kernel, interpreted."""
    interpreted = functools.partial(attention_pallas_tpu, interpret=True)
    monkeypatch.setitem(api._IMPLEMENTATIONS, "pallas_tpu", interpreted)


def draw(total=LENGTH, length=LENGTH, groups=GROUPS, dtype="float32", seed=0):
    """Queries, keys, values and the outputs' cotangent."""
    rng = np.random.default_rng(seed)
    of_queries, of_keys = (BATCH, length, HEADS, DIM), (BATCH, total, groups, DIM)
    shapes = (of_queries, of_keys, of_keys, of_queries)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def numbers(*rows):
    return jnp.asarray(rows, jnp.int32)


PACKED = numbers([0] * 4 + [1] * 6, [5] * 9 + [6])
# a cache whose first keys are another document's, or empty; the last query belongs to nobody
PAIR = (
    numbers([0] * 4 + [1] * 6, [0] * 9 + [2]),
    numbers([-1] * 2 + [0] * 6 + [1] * 6, [0] * 14),
)
CASES = {
    "causal": {},
    "all to all": {"causal": False},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window to both sides": {"causal": False, "window": 3},
    "window of everything": {"window": 40},
    "prefix": {"prefix": 4},
    "prefix of everything": {"prefix": 40},
    "prefix and window": {"prefix": 2, "window": 3},
    "one prefix a sequence": {"prefix": jnp.array([0, 6])},
    "documents": {"documents": PACKED},
    "documents, window, prefix": {"documents": PACKED, "window": 3, "prefix": 2},
    "longer keys": {"total": TOTAL},
    "longer keys, window": {"total": TOTAL, "window": 6},
    "longer keys, all to all": {"total": TOTAL, "causal": False},
    "a cache with documents": {"total": TOTAL, "documents": PAIR, "window": 6},
    "one query": {"length": 1, "total": 5},
    "one key head": {"groups": 1},
    "as many key heads": {"groups": HEADS},
    "scaled": {"scale": 0.7},
}


def split(case):
    """Shapes, and options of the call."""
    shapes = ("total", "length", "groups")
    options = {name: value for name, value in CASES[case].items() if name not in shapes}
    sizes = {name: value for name, value in CASES[case].items() if name in shapes}
    return sizes, options


def loop(q, k, v, g, *, causal=True, window=None, prefix=0, documents=None, scale=None):
    """Outputs and cotangents of queries, keys and values, one query at a time, in float64."""
    q, k, v, g = (np.asarray(a, np.float64) for a in (q, k, v, g))
    length, total, share = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    scale = 1 / np.sqrt(q.shape[3]) if scale is None else scale
    of_queries, of_keys = documents if isinstance(documents, tuple) else (documents, documents)
    y, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen, at = [], t + total - length
        for s in range(total):
            near = window is None or (at - window < s if s <= at else s < at + window)
            reached = (near and (s <= at or not causal)) or s < np.broadcast_to(prefix, 2)[b]
            if reached and (documents is None or of_queries[b, t] == of_keys[b, s]):
                seen.append(s)
        if not seen:
            continue
        near_k, near_v = k[b, seen, h // share], v[b, seen, h // share]
        score = scale * near_k @ q[b, t, h]
        a = np.exp(score - score.max())
        a /= a.sum()
        y[b, t, h] = a @ near_v
        da = near_v @ g[b, t, h]
        ds = scale * a * (da - a @ da)
        dq[b, t, h] = ds @ near_k
        dk[b, seen, h // share] += ds[:, None] * q[b, t, h]
        dv[b, seen, h // share] += a[:, None] * g[b, t, h]
    return y, dq, dk, dv


def with_cotangents(form, q, k, v, g):
    y, pull = jax.vjp(form, q, k, v)
    return (y, *pull(g))


# the reference has every mask and the others share it: what differs, as each takes time to compile
SPLASH = ("all to all", "documents, window, prefix", "a cache with documents")
XLA = (*SPLASH, "causal", "one prefix a sequence", "one key head", "as many key heads", "scaled")
RUNS = [(case, "reference") for case in CASES]
RUNS += [(case, "xla") for case in XLA] + [(case, "pallas_tpu") for case in SPLASH]


@pytest.mark.usefixtures("splash")
class TestEveryBackend:
    """Values and gradients."""

    @pytest.mark.parametrize(("case", "implementation"), RUNS)
    def test_equals_the_loop(self, case, implementation):
        sizes, options = split(case)
        arrays = draw(**sizes)
        form = functools.partial(attention, **options, implementation=implementation)
        found = jax.jit(functools.partial(with_cotangents, form))(*arrays)
        for a, b in zip(found, loop(*arrays, **options), strict=True):
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, atol=5e-6)
        # one query sees nothing: zeros, in the loop as well
        assert (not found[0][1, -1].any()) == (case == "a cache with documents")

    @pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
    def test_bfloat16(self, implementation):
        arrays = draw(dtype="bfloat16")
        form = functools.partial(attention, implementation=implementation, window=7)
        with jax.numpy_dtype_promotion("standard"):  # for the transpose of JAX's own product
            found = jax.jit(functools.partial(with_cotangents, form))(*arrays)
        for a, b in zip(found, loop(*arrays, window=7), strict=True):
            assert a.dtype == jnp.bfloat16
            np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize("case", ["a cache with documents", "prefix and window"])
def test_float64_equals_the_loop(x64, case):
    sizes, options = split(case)
    arrays = draw(**sizes, dtype="float64")
    form = functools.partial(attention, **options)
    found = jax.jit(functools.partial(with_cotangents, form))(*arrays)
    for a, b in zip(found, loop(*arrays, **options), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, atol=1e-13)
    for implementation in ("xla", "pallas_tpu"):
        with pytest.raises(NotImplementedError, match="float64"):
            attention(*arrays[:3], **options, implementation=implementation)


@pytest.mark.usefixtures("splash")
class TestSplash:
    """The kernel over several blocks, and that it is the kernel."""

    def test_several_blocks_and_a_rest(self):
        """The first block of keys is behind every window, the last one is filled up."""
        options = {"window": 20}
        arrays = draw(length=140, total=300, groups=1)
        forms = [
            functools.partial(attention, **options, implementation=how)
            for how in ("reference", "pallas_tpu")
        ]
        results = [jax.jit(functools.partial(with_cotangents, form))(*arrays) for form in forms]
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, atol=5e-6)

    def test_its_kernels_run_and_skip_what_the_window_does_not_reach(self):
        """Of four blocks of keys each block of queries visits the two that it can see."""
        arrays = draw(length=512, total=512)

        def text(window):
            def form(q, k, v):
                blocks = functools.partial(attention_pallas_tpu, block=128, interpret=True)
                return blocks(q, k, v, api.Masks(window=window), 0.5)

            return str(jax.make_jaxpr(functools.partial(with_cotangents, form))(*arrays))

        narrow, wide = text(100), text(None)
        for part in ("fwd_residuals", "dq_no_residuals", "dkv_no_residuals"):
            assert f"splash_mha_{part}" in narrow
        # the third kernel, of the keys' gradient, has its blocks and the four heads in turn
        assert narrow.count(f"grid=({BATCH}, {HEADS}, 4, 2)") == 3
        assert wide.count(f"grid=({BATCH}, {HEADS}, 4, 4)") == 3


def test_cudnn_is_called_with_the_mask_it_knows(monkeypatch):
    """Lowered for CUDA, where neither a GPU nor cuDNN is at hand."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    arrays = draw(dtype="bfloat16")
    names = ("Softmax", "SoftmaxBackward", "ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward")
    calls = [f"__cudnn$fmha{name}" for name in names]
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(name) for name in calls]

    def text(masks):
        def form(q, k, v):
            return attention_cudnn(q, k, v, masks, 0.5)

        function = jax.jit(functools.partial(with_cotangents, form))
        export = jax.export.export(function, platforms=["cuda"], disabled_checks=unchecked)
        return export(*arrays).mlir_module()

    own, masked = text(api.Masks(window=3)), text(api.Masks(documents=(PACKED, PACKED)))
    assert all(f"@{name}(" in own for name in calls[:2])
    # as many tokens as the window says, the query itself included
    assert own.count("sliding_window_length\\22: 3") == own.count("CAUSAL") == 2
    assert all(f"@{name}(" in masked for name in calls[2:])


class _Elsewhere:
    """What the choice asks of a device."""

    def __init__(self, platform, **more):
        self.platform = platform
        self.compute_capability = more.get("capability", "8.0")
        self.client = type("Client", (), {"platform_version": more.get("version", "")})


CUDA = {"platform": "gpu", "version": "cuda 12090"}


@pytest.mark.parametrize(
    ("device", "options", "expected", "why"),
    [
        ({"platform": "cpu"}, {}, "reference", None),
        ({"platform": "gpu", "version": "rocm 6"}, {}, "xla", None),
        (CUDA, {}, "cudnn", None),
        (CUDA, {"dtype": "float64"}, "reference", None),
        (CUDA, {"dtype": "float32"}, "xla", "takes float16 and bfloat16, not float32"),
        (CUDA, {"width": 12}, "xla", "multiple of 8 up to 128, not 12"),
        (CUDA, {"width": 256}, "xla", "multiple of 8 up to 128, not 256"),
        ({**CUDA, "capability": "9.0"}, {"width": 256}, "cudnn", None),
        (CUDA, {"length": 129}, "cudnn", None),
        (CUDA, {"length": 129, "prefix": 3}, "xla", "masks of even lengths, not 129 x 129"),
        (CUDA, {"mesh": AxisType.Explicit}, "xla", "Explicit axes"),
        (CUDA, {"mesh": AxisType.Auto}, "cudnn", None),
        ({"platform": "tpu"}, {}, "pallas_tpu", None),
        ({"platform": "tpu"}, {"length": 127}, "xla", None),
        ({"platform": "tpu"}, {"dtype": "float16"}, "xla", "float32 and bfloat16, not float16"),
        ({"platform": "tpu"}, {"prefix": jnp.array([1]), "window": 9}, "xla", "one prefix for all"),
        ({"platform": "tpu"}, {"mesh": AxisType.Auto}, "xla", "only inside jax.shard_map"),
    ],
)
def test_what_runs_where(x64, monkeypatch, device, options, expected, why):
    more = dict(options)
    mesh = more.pop("mesh", None)
    shape = (1, more.pop("length", 128), 2, more.pop("width", 64))
    x = jnp.zeros(shape, more.pop("dtype", "bfloat16"))

    def ask():
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda: [_Elsewhere(**device)])
            return default_implementation(x, x, x, **more)

    def choose():
        if mesh is None:
            return ask()
        with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(mesh,))):
            return ask()

    if why is None:
        assert choose() == expected
    else:
        with pytest.warns(UserWarning, match=f"attention runs in XLA: .*{why}"):
            assert choose() == expected


def fake(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": fake(2, 3)}, ValueError, r"needs queries \[B, T, H, K\] .* got \(2, 3\)"),
        ({"keys": fake(1, 4, 3, 8)}, ValueError, r"keys have shape \(1, 4, 3, 8\), expected"),
        ({"values": fake(1, 4, 1, 8)}, ValueError, r"values have shape \(1, 4, 1, 8\)"),
        ({"values": fake(1, 4, 2, 8, dtype=jnp.bfloat16)}, ValueError, "dtypes .* cast them"),
        ({"queries": fake(1, 5, 2, 8)}, ValueError, "4 keys for 5 queries"),
        ({"window": 0}, ValueError, "window=0 must be"),
        ({"prefix": -1}, ValueError, "prefix=-1 must be"),
        ({"prefix": jnp.zeros(3, jnp.int32)}, ValueError, r"prefix is int32\[3\], expected"),
        ({"documents": jnp.zeros((1, 3), jnp.int32)}, ValueError, r"int32\[1, 3\], expected"),
        (
            {"prefix": jnp.zeros(1, jnp.int32), "window": 2, "implementation": "pallas_tpu"},
            NotImplementedError,
            "one prefix for all sequences",
        ),
        ({"implementation": "flash"}, ValueError, "implementation='flash' is not one of reference"),
        ({"implementation": "pallas_gpu"}, NotImplementedError, "use 'cudnn', the GPU's kernel"),
        ({"implementation": "cudnn"}, NotImplementedError, "needs a CUDA device, not cpu"),
    ],
)
def test_mistakes_are_named(change, error, message):
    x = fake(1, 4, 2, 8)
    with pytest.raises(error, match=message):
        attention(**{"queries": x, "keys": x, "values": x, **change})


@pytest.mark.tpu_compile
@pytest.mark.parametrize("generation", tpu.TPUS)
@pytest.mark.parametrize("width", [64, 128])
def test_compiles_ahead_of_time(generation, width):
    """Sixteen heads over 1,024 tokens with a window, a prefix and documents, with gradients."""

    def form(q, k, v, documents, g):
        call = functools.partial(
            attention, window=256, prefix=16, documents=documents, implementation="pallas_tpu"
        )
        return with_cotangents(call, q, k, v, g)

    x, documents = ((1, 1024, 16, width), "bfloat16"), ((1, 1024), "int32")
    text = tpu.compiled(form, generation, x, x, x, documents, x).as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, and backward by queries and by keys
