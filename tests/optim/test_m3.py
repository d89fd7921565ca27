"""M3 against a loop in numpy and against the optimizers it becomes without its extras."""

import jax
import numpy as np
import optax
import pytest

from nestedjax import levels, optim
from tests.optim.running import draw, numpy_ns, run

T, F = 11, 3


@pytest.fixture(autouse=True)
def wide(x64):
    """Everything here is an oracle; Adam's bias correction in optax raises a float to an int."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def loop(grads, *, b1, b2, b3, periods, weights, ema=True, moment="grad", warm=False, rms=0.2):
    """Algorithm 1 with the resolutions of the specification, step by step."""
    zero = np.zeros(grads.shape[1:])
    m1, v = zero, zero
    m2, total, o2 = ({f: zero for f in periods} for _ in range(3))
    out = []
    for t, g in enumerate(np.asarray(grads), 1):
        m1 = b1 * m1 + (1 - b1) * g if ema else m1 + b1 * g
        u = numpy_ns(m1)
        for f, w in zip(periods, weights, strict=True):
            total[f] = total[f] + g
            u = u + w * (numpy_ns(total[f]) if warm and t <= f else o2[f])
            if t % f == 0:
                mean = total[f] / f
                m2[f] = b3 * m2[f] + (1 - b3) * mean if ema else m2[f] + b3 * total[f]
                o2[f], total[f] = numpy_ns(m2[f]), zero
        if moment != "none":
            square = (g if moment == "grad" else u) ** 2
            v = b2 * v + (1 - b2) * square if ema else v + b2 * square
            u = u / (np.sqrt(v / (1 - b2**t) if ema else v) + 1e-8)
        if rms is not None:
            u = u * rms / np.sqrt(np.mean(u**2, axis=(-2, -1), keepdims=True))
        out.append(u)
    return np.stack(out)


CASES = {
    "default": {},
    "sums": {"ema": False},
    "second moment of the sum": {"moment": "ortho"},
    "no second moment, no rescaling": {"moment": "none", "rms": None},
    "partial": {"warm": True},
    "two slow scales": {"periods": (2, 4), "weights": (0.5, 0.25)},
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_algorithm(case):
    given = {"periods": (F,), "weights": (0.5,)} | CASES[case]
    grads = draw(T, 2, 5, 4)
    decays = {"b1": 0.9, "b2": 0.95, "b3": 0.8}
    expected = loop(grads.mT, **decays, **given)  # [inputs, outputs] in JAX's kernels
    tx = optim.scale_by_m3(
        **decays,
        period=given["periods"],
        slow_weight=given["weights"],
        accumulate="ema" if given.get("ema", True) else "sum",
        second_moment=given.get("moment", "grad"),
        rms_rescale=given.get("rms", 0.2),
        warm_slow="partial" if given.get("warm") else "off",
        cache=case != "two slow scales",
    )
    updates, _, _ = run(tx, grads[0], grads)
    np.testing.assert_allclose(updates, expected.mT, atol=1e-10)


def test_without_extras_it_is_adam():
    """Oracle 14: no orthogonalisation, no slow term, M1 corrected too."""
    params = {"kernel": draw(4, 3), "bias": draw(3)}
    grads = {"kernel": draw(9, 4, 3, seed=1), "bias": draw(9, 3, seed=2)}
    tx = optim.scale_by_m3(
        b1=0.9,
        b2=0.99,
        slow_weight=0.0,
        period=4,
        rms_rescale=None,
        orthogonalize="none",
        bias_correction="both",
    )
    updates, _, _ = run(tx, params, grads)
    adam, _, _ = run(optax.scale_by_adam(0.9, 0.99), params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), updates, adam)


def test_without_extras_it_is_muon():
    """Oracle 14: exactly optax's Muon in its moving-average form."""
    params, grads = {"w": draw(4, 3)}, {"w": draw(9, 4, 3, seed=1)}
    muon = optax.contrib.scale_by_muon(
        eps=1e-30, nesterov=False, weight_dimension_numbers={"w": AXES}
    )
    expected, _, _ = run(muon, params, grads)
    exact = optim.scale_by_m3(
        slow_weight=0.0,
        second_moment="none",
        rms_rescale=None,
        bias_correction="both",
    )
    updates, _, _ = run(exact, params, grads)
    np.testing.assert_allclose(updates["w"], expected["w"], atol=1e-10)


AXES = optim.MatrixAxes(0, 1)


def test_sums_do_not_depend_on_b1_and_b3():
    grads = draw(T, 4, 3)
    one, other = (
        optim.scale_by_m3(accumulate="sum", b1=b1, b3=b3, period=F, slow_weight=0.7, eps=1e-30)
        for b1, b3 in ((0.9, 0.5), (0.2, 0.05))
    )
    a, b = (run(tx, grads[0], grads)[0] for tx in (one, other))
    np.testing.assert_allclose(a, b, atol=1e-10)


def test_slow_memory_is_off_for_f_steps_and_written_floor_t_over_f_times():
    grads = draw(T, 4, 3)
    on = optim.scale_by_m3(period=F)
    off = optim.scale_by_m3(period=F, slow_weight=0.0)
    a, b = (np.asarray(run(tx, grads[0], grads)[0]) for tx in (on, off))
    assert a[:F].tobytes() == b[:F].tobytes() and np.abs(a[F] - b[F]).max() > 1e-3
    state, update, held = on.init(grads[0]), jax.jit(on.update), []
    for g in grads:
        _, state = update(g, state)
        held.append(np.asarray(state.slow[f"every_{F}"].mu).tobytes())
    changes = [t + 1 for t in range(T) if held[t] != ([bytes(96)] + held)[t]]
    assert changes == [3, 6, 9] and len(changes) == T // F


def test_sums_with_period_one_hold_all_earlier_gradients():
    """Oracle: f = 1, sum: M2 in force at step t is b3 sum_{i < t} g_i."""
    grads = draw(5, 4, 3)
    tx = optim.scale_by_m3(accumulate="sum", period=1, b3=0.7)
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    for t in range(5):
        expected = 0.7 * np.asarray(grads[:t]).sum(0)
        np.testing.assert_allclose(state.slow["every_1"].mu, expected, atol=1e-12)
        _, state = update(grads[t], state)


def test_nonlinear_momentum_is_muon():
    """Oracle 11: W + sigma(m) with sigma = Newton-Schulz is Muon, here to the last argument."""
    params, grads = {"w": draw(4, 3)}, {"w": draw(9, 4, 3, seed=1)}
    for scale, consistent in (("rms", 0.2), ("jordan", None)):
        tx = optim.nonlinear_momentum(
            0.02, decay=0.9, nesterov=False, scale=scale, weight_decay=0.3
        )
        muon = optax.contrib.muon(
            0.02,
            beta=0.9,
            nesterov=False,
            consistent_rms=consistent,
            weight_decay=0.3,
            eps=1e-30,
        )
        ours, theirs = (run(t, params, grads)[1]["w"] for t in (tx, muon))
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize(
    ("output", "nesterov"),
    [("quintic", True), ("cubic", False), ("svd", False), ("sign", False), ("none", True)],
)
def test_nonlinear_momentum_against_numpy(output, nesterov):
    grads, m = draw(4, 2, 4, 3), 0.0
    tx = optim.scale_by_nonlinear_momentum(decay=0.8, output=output, nesterov=nesterov)
    updates, _, _ = run(tx, grads[0], grads)
    for t, g in enumerate(np.asarray(grads)):
        m = 0.8 * m + g
        read = g + 0.8 * m if nesterov else m
        u, _, vt = np.linalg.svd(read, full_matrices=False)
        expected = {
            "quintic": lambda r=read: numpy_ns(r),
            "cubic": lambda r=read: numpy_ns(r, cubic=True),
            "svd": lambda u=u, vt=vt: u @ vt,
            "sign": lambda r=read: np.sign(r),
            "none": lambda r=read: r,
        }[output]()
        np.testing.assert_allclose(updates[t], expected, atol=1e-10)


def test_sign_of_no_momentum_is_signsgd():
    """Oracle of B6: phi = sign, mu = 0."""
    params, grads = {"b": draw(3)}, {"b": draw(4, 3, seed=1)}
    tx = optim.scale_by_nonlinear_momentum(decay=0.0, output="sign", nesterov=False)
    ours, theirs = (run(t, params, grads)[0]["b"] for t in (tx, optax.scale_by_sign()))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("accumulate", ["trace", "ema"])
def test_adamuon_against_numpy(accumulate):
    grads = draw(6, 4, 3)
    updates, _, _ = run(optim.scale_by_adamuon(accumulate=accumulate, b2=0.9), grads[0], grads)
    m, v = 0.0, 0.0
    for t, g in enumerate(np.asarray(grads)):
        m = 0.95 * m + g
        o = numpy_ns(np.sign(m))
        v = 0.9 * v + 0.1 * o**2
        u = o / (np.sqrt(v) + 1e-8)
        np.testing.assert_allclose(updates[t], u * 0.2 / np.sqrt(np.mean(u**2)), atol=1e-10)


def test_the_alias_is_its_parts():
    """Decoupled decay on matrices, AdamW with none on the rest, by label."""
    params = {"kernel": draw(4, 3), "bias": draw(3), "table": draw(6, 3)}
    grads = jax.tree.map(lambda p: draw(5, *p.shape, seed=p.size), params)
    axes = {"kernel": AXES, "bias": None, "table": None}
    _, history, _ = run(optim.m3(0.1, period=2, axes=axes, weight_decay=0.5), params, grads)
    adamw, _, _ = run(optax.adamw(0.1, 0.9, 0.95, weight_decay=0.0), params, grads)
    for name in ("bias", "table"):
        moved = np.cumsum(np.asarray(adamw[name]), 0) + np.asarray(params[name])
        np.testing.assert_allclose(history[name], moved, atol=1e-10)
    rule, _, _ = run(optim.scale_by_m3(period=2), params["kernel"], grads["kernel"])
    w = np.asarray(params["kernel"])
    for t in range(5):
        w = w - 0.1 * (np.asarray(rule[t]) + 0.5 * w)
        np.testing.assert_allclose(history["kernel"][t], w, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": "mean"}, "accumulate='mean' is not one of ema, sum"),
        ({"second_moment": "w"}, "second_moment='w' is not one of"),
        ({"period": 0}, "period=0 must be an integer >= 1"),
        ({"period": (4, 4)}, r"period=\(4, 4\)"),
        ({"slow_weight": (0.1, 0.2)}, "needs a weight for each period"),
        ({"b1": 1.5}, "b1=1.5 must be at least 0 and less than 1"),
        ({"orthogonalize": "qr"}, "orthogonalize='qr' is not one of quintic, cubic, svd, none"),
    ],
)
def test_mistakes_are_named(change, message, unchecked):
    with pytest.raises(ValueError, match=message):
        optim.m3(0.1, **change)


def test_axes_that_do_not_fit_name_the_leaf():
    tree = {"block": {"kernel": draw(4, 3), "bias": draw(3)}}
    for axes, message in [
        ({"block": {"kernel": AXES, "bias": AXES}}, "'block.bias' has shape"),
        ({"block": {"kernel": AXES}}, "say nothing about the parameter 'block.bias'"),
        ({"block": optim.MatrixAxes(0, 0)}, "'block.bias'|'block.kernel'"),
        ({"block": {"kernel": "matrix", "bias": None}}, "axes of 'block.kernel' are 'matrix'"),
    ]:
        with pytest.raises(ValueError, match=message):
            optim.m3(0.1, axes=axes).init(tree)


def test_describe_shows_the_slow_memory_at_its_own_period():
    """Alone, and inside by_period, where its steps are the writes of its label."""
    params = {"w": draw(4, 3)}
    tx = optim.m3(0.1, period=(5, 20))
    memories = optim.boxes_of(jax.eval_shape(tx.init, params))
    described = levels.describe((), memories, params=params, step_tokens=64)
    boxes = {box.name: box for box in described}
    assert {name: box.period for name, box in boxes.items()} == {
        "parameters": 64,
        "matrix first moment": 64,
        "matrix second moment": 64,
        "matrix every 5 first moment": 320,
        "matrix every 5 gradient accumulator": 64,
        "matrix every 20 first moment": 1280,
        "matrix every 20 gradient accumulator": 64,
    }
    assert boxes["matrix every 5 first moment"].state_bytes == 2 * 12 * 8  # M2 and O(M2)
    fast, slow, weights = (
        boxes[f"matrix {name}first moment"].level for name in ("", "every 20 ", "every 5 ")
    )
    assert slow < weights < boxes["parameters"].level < fast
    nested = optim.by_period({"cms": (4, optim.m3(0.1, period=5))}, lambda p: {"w": "cms"})
    memories = optim.boxes_of(jax.eval_shape(nested.init, params))
    tokens = optim.in_tokens({"cms": 4}, step_tokens=64)
    described = levels.describe((), memories, params=params, step_tokens=tokens)
    boxes = {box.name: box for box in described}
    assert boxes["cms matrix first moment"].period == 256
    assert boxes["cms matrix every 5 first moment"].period == 1280
    assert boxes["cms matrix every 5 gradient accumulator"].period == 256
    assert boxes["cms gradient accumulator"].period == 64


def test_adamuon_with_nesterov_momentum():
    """The reference's default reads `b1 M + g`; with it two steps differ from those without."""
    grads, m, v = draw(4, 4, 3), 0.0, 0.0
    updates, _, _ = run(optim.scale_by_adamuon(b1=0.8, b2=0.9, nesterov=True), grads[0], grads)
    plain, _, _ = run(optim.scale_by_adamuon(b1=0.8, b2=0.9), grads[0], grads)
    for t, g in enumerate(np.asarray(grads)):
        m = 0.8 * m + g
        o = numpy_ns(np.sign(0.8 * m + g))
        v = 0.9 * v + 0.1 * o * o
        u = o / (np.sqrt(v) + 1e-8)
        np.testing.assert_allclose(updates[t], 0.2 * u / np.sqrt(np.mean(u * u)), atol=1e-9)
    assert np.abs(updates - plain).max() > 0.01
