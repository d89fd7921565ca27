"""The order of boxes and the worked decompositions of specification A7."""

import inspect
import json
from fractions import Fraction
from math import inf
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nestedjax as nj
from nestedjax import levels, optim, run
from nestedjax.levels import Box

WEIGHTS = jnp.zeros((4, 3))
SGD = optim.boxes_of(optax.sgd(0.1).init(WEIGHTS))


def names(boxes):
    """Names by level, slow to fast, from described boxes."""
    grouped = {}
    for box in boxes:
        grouped.setdefault(box.level, set()).add(box.name)
    assert sorted(grouped) == list(range(len(grouped)))
    return [grouped[level] for level in sorted(grouped)]


def linear_attention():
    return levels.read_write(
        "attention",
        1,
        init=lambda params: jnp.zeros((3, 3)),
        read=lambda params, state, x: x @ state.T,
        write=lambda params, state, x: state + x.T @ x,
        about={"objective": "dot", "rule": "gradient"},
    )


def test_order_of_frequencies():
    """Oracle 53."""
    boxes = [
        Box("projections", None),
        Box("memory", Fraction(16)),
        Box("cms slow", 512),
        Box("attention", 0),
        Box("cms fast", Fraction(31, 2)),
    ]
    for listing in (boxes, boxes[::-1]):
        found = [{box.name for box in level} for level in levels.order(listing)]
        assert found == [{"projections"}, {"cms slow"}, {"memory"}, {"cms fast"}, {"attention"}]
    assert [box.frequency for box in boxes] == [
        0,
        Fraction(1, 16),
        Fraction(1, 512),
        inf,
        Fraction(2, 31),
    ]


def test_order_at_equal_frequency():
    boxes = [Box(name, 8) for name in "abcd"] + [Box("e", 2)]
    layers = levels.order(boxes, {"a": ["b", "e"], "b": ["c"], "d": ["c"], "e": ["a"]})
    assert [{box.name for box in layer} for layer in layers] == [{"a"}, {"b", "d"}, {"c"}, {"e"}]


def test_a_circle_at_equal_frequency_is_refused():
    boxes = [Box(name, 8) for name in "abc"] + [Box("d", 4)]
    with pytest.raises(ValueError, match="circle: 'a' needs 'b' needs 'c' needs 'a'"):
        levels.order(boxes, {"a": ["b"], "b": ["c"], "c": ["a"]})
    levels.order(boxes, {"a": ["d"], "d": ["a"]})  # different frequencies: no circle
    with pytest.raises(ValueError, match="'z'"):
        levels.order(boxes, {"a": ["z"]})
    with pytest.raises(ValueError, match="different names"):
        levels.order([*boxes, Box("a", 1)])


def test_sgd_on_a_linear_layer_is_one_level():
    boxes = levels.describe((), SGD, params=WEIGHTS, step_tokens=64)
    assert names(boxes) == [{"parameters"}]
    assert (boxes[0].parameters, boxes[0].state_bytes, boxes[0].period) == (12, 48, 64)


def test_sgd_with_momentum_is_two_levels():
    state = optax.sgd(0.1, momentum=0.9).init(WEIGHTS)
    boxes = levels.describe((), optim.boxes_of(state), params=WEIGHTS, step_tokens=64)
    assert names(boxes) == [{"parameters"}, {"momentum"}]
    assert boxes[1].parameters == 12 and boxes[1].transfer == "gen_context"


def test_linear_attention_trained_by_sgd():
    level = linear_attention()
    boxes = levels.describe(level, SGD, params=WEIGHTS, step_tokens=64)
    assert names(boxes) == [{"parameters"}, {"attention"}]
    assert boxes[1].state_bytes == 36 and boxes[1].objective == "dot"
    state = optax.sgd(0.1, momentum=0.9).init(WEIGHTS)
    boxes = levels.describe(level, optim.boxes_of(state), params=WEIGHTS, step_tokens=64)
    assert names(boxes) == [{"parameters"}, {"momentum"}, {"attention"}]


def test_the_moments_of_adamw_share_a_level():
    state = jax.eval_shape(optax.adamw(1e-3).init, WEIGHTS)  # shapes suffice
    boxes = levels.describe((), optim.boxes_of(state), params=WEIGHTS)
    assert names(boxes) == [{"parameters"}, {"first moment", "second moment"}]


def test_transformer_is_frozen_projections_and_attention():
    boxes = [
        Box("attention", 0, objective="kernel regression", transfer="nonparam"),
        Box("projections and MLP", None, parameters=100),
    ]
    assert names(levels.describe(boxes)) == [{"projections and MLP"}, {"attention"}]
    memories = optim.boxes_of(optax.adamw(1e-3).init(WEIGHTS))
    trained = levels.describe(boxes, memories, step_tokens=2048)
    assert names(trained)[0] == {"projections and MLP"}
    assert trained[0].period == 2048 and len(names(trained)) == 3


def test_adatransformer():
    """Equation 69: attention, then a fast matrix whose start is learned."""
    fast = levels.read_write(
        "W",
        1,
        init=lambda params: params,
        read=lambda params, state, x: x @ state.T,
        write=lambda params, state, x: state + x.T @ x,
        about={"transfer": "init"},
    )
    described = levels.describe(fast, params=jnp.zeros((3, 3)))
    boxes = levels.describe([Box("attention", 0), Box("projections", None), *described])
    assert names(boxes) == [{"projections"}, {"W"}, {"attention"}]
    assert boxes[1].transfer == "init" and boxes[1].parameters == 9


def test_other_optimizers():
    params = {"a": WEIGHTS, "b": WEIGHTS}
    tx = optax.partition(
        {"fast": optax.sgd(0.1, momentum=0.9), "slow": optax.adam(0.1)}, {"a": "fast", "b": "slow"}
    )
    tokens = {"": 1, "fast": 16, "slow": 64}
    boxes = levels.describe((), optim.boxes_of(tx.init(params)), params=params, step_tokens=tokens)
    assert {box.name: box.period for box in boxes} == {
        "parameters": 1,
        "fast momentum": 16,
        "slow first moment": 64,
        "slow second moment": 64,
    }
    assert [box.parameters for box in boxes if box.name == "fast momentum"] == [12]
    tx = optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 4)
    boxes = levels.describe((), optim.boxes_of(tx.init(WEIGHTS)), params=WEIGHTS)
    assert names(boxes) == [{"parameters"}, {"momentum"}, {"gradient accumulator"}]
    tx = optax.chain(optax.trace(0.9), optax.trace(0.5), optax.scale_by_lbfgs())
    found = {box.name for box in levels.describe((), optim.boxes_of(tx.init(WEIGHTS)))}
    assert found == {"momentum", "momentum 2", "state of ScaleByLBFGSState"}


class Theirs(NamedTuple):
    """A state that this library has never seen: a counter, a momentum-like tree, another state."""

    count: jax.Array
    mu: object
    inner: object


class Ours(NamedTuple):
    """A state that says itself what it remembers, one part of it four times slower."""

    fast: object
    slow: object

    def memories(self):
        fast = optim.Memory("fast weights", self.fast, "dot", "gradient step", cache=self.fast)
        return fast, optim.Part(self.slow, "late", 4)


def test_states_that_are_not_known_and_states_that_say_what_they_hold():
    trace = optax.TraceState(WEIGHTS)
    theirs = Theirs(jnp.zeros((), jnp.int32), {"w": WEIGHTS, "b": optax.MaskedNode()}, trace)
    boxes = levels.describe((), optim.boxes_of((theirs, optax.EmptyState())), step_tokens=8)
    assert [(box.name, box.parameters) for box in boxes] == [
        ("momentum", 12),
        ("state of Theirs", 12),
    ]
    for alone in ({"m": WEIGHTS}, WEIGHTS):
        (box,) = optim.boxes_of(alone)(1)
        assert box.name.startswith("state of") and box.parameters == 12
    ours = Ours(WEIGHTS, optax.MultiStepsState((), (), trace, WEIGHTS, ()))
    found = {box.name: box for box in optim.boxes_of({"label": ours})({"": 8, "label": 16})}
    assert {name: box.period for name, box in found.items()} == {
        "label fast weights": 16,
        "label late momentum": 64,
        "label late gradient accumulator": 16,
    }
    assert found["label fast weights"].state_bytes == 2 * 48


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (optax.amsgrad, {"first moment", "second moment", "state of ScaleByAmsgradState"}),
        (optax.lion, {"first moment"}),
        (optax.rmsprop, {"second moment"}),
        (optax.adagrad, {"sum of squares"}),
        (optax.adabelief, {"first moment", "second moment"}),
        (optax.novograd, {"first moment", "second moment"}),
        (optax.contrib.muon, {"muon first moment"}),
        (lambda rate: optax.ema(rate), {"average"}),
        (lambda rate: optax.apply_every(3), {"gradient accumulator"}),
        (lambda rate: optax.scale_by_rms(bias_correction=True), {"second moment"}),
        (lambda rate: optax.scale_by_stddev(), {"first moment", "second moment"}),
    ],
)
def test_the_states_of_optax_are_known_by_name(make, expected):
    """Of this version of optax: another name of a state shows here, not as a worse listing."""
    with jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(make(0.1).init, WEIGHTS)
    assert {box.name for box in optim.boxes_of(state)(1)} == expected


def test_a_state_in_place_of_its_boxes_is_refused():
    describe = inspect.unwrap(levels.describe)  # without the runtime check of its types
    with pytest.raises(ValueError, match=r"is a tuple.* give optim.boxes_of\(state\)"):
        describe((), optax.adam(0.1).init(WEIGHTS))


def test_a_composition_describes_its_parts():
    system = levels.chain(
        linear_attention()._replace(name="slow", period=16),
        levels.chain(
            linear_attention()._replace(name="first", period=4),
            linear_attention()._replace(name="second", period=4),
            name="inner",
        ),
    )
    params = {"slow": None, "inner": (None, None)}
    boxes = levels.describe(system, params=params)
    assert names(boxes) == [{"slow"}, {"inner/second", "inner/first"}]

    class Model:
        def boxes(self):
            return boxes

    assert levels.describe(Model()) == boxes


def test_what_says_its_order_twice_is_ordered_once():
    """A block with a period beside frozen weights: an optimizer of that period writes both."""
    own = levels.describe([Box("cms", 64, 3, rule="optimizer"), Box("projections", None, 5)])
    assert names(own) == [{"projections"}, {"cms"}]
    memories = optim.boxes_of(optax.sgd(0.1, momentum=0.9).init(WEIGHTS))
    boxes = levels.describe(own, memories, step_tokens=64)
    assert names(boxes) == [{"projections", "cms"}, {"momentum"}]


def test_what_reads_the_start_of_its_period_shares_a_level():
    def anchored(name):
        return levels.read_write(
            name,
            4,
            init=lambda params: jnp.zeros(()),
            read=lambda params, state, x: x + state,
            write=lambda params, state, x: x.mean(),
        )

    system = levels.flow(anchored("first"), anchored("second"))
    assert names(levels.describe(system, params=(None, None))) == [{"first", "second"}]


@pytest.mark.parametrize("preset", ["hope_nano", "hope_attention_nano", "transformer_nano"])
def test_the_order_of_the_presets_is_that_of_a4(preset):
    boxes = run.nested_system(nj.run_preset(preset)).boxes
    slow = [box for box in boxes if box.rule == "optimizer"]
    assert {box.level for box in slow if box.period == 2048} == {
        next(box.level for box in boxes if box.name == "embedding")
    }
    memories = {box.level for box in boxes if box.objective == "delta"}
    assert len(memories) == (preset == "hope_nano")
    frequencies = [box.frequency for box in boxes]
    assert frequencies == sorted(frequencies)


def test_the_table_fits_a_terminal():
    for preset in [name for name in nj.models.PRESETS if name.endswith(("nano", "hope_1p3b"))]:
        for optimizer in ("adamw", "m3"):
            system = run.nested_system(nj.run_preset(preset, optimizer=optimizer))
            wide = max(map(len, levels.table(system.boxes).splitlines()))
            assert wide <= 80, (preset, optimizer, wide)


def test_rows_and_table():
    boxes = levels.describe(
        [
            Box("memory", 16, 1234, 4936, "l2", "delta", "param"),
            Box("frozen", None, 7),
            Box("cms", Fraction(31, 2)),
            Box("attention", 0, transfer="nonparam"),
        ]
    )
    assert levels.table(boxes).splitlines() == [
        f"{'level 1 of 4, frozen':48}{'parameters':>15}{'state bytes':>15}",
        f"    {'frozen':44}{'7':>15}{'0':>15}",
        "level 2 of 4, written every 16 tokens",
        "  l2; delta; param",
        f"    {'memory':44}{'1,234':>15}{'4,936':>15}",
        "level 3 of 4, written every 31/2 tokens",
        f"    {'cms':44}{'0':>15}{'0':>15}",
        "level 4 of 4, solved anew for every query",
        "  nonparam",
        f"    {'attention':44}{'0':>15}{'0':>15}",
    ]
    rows = json.loads(json.dumps([box.row() for box in boxes]))
    assert rows[1]["period"] == 16 and rows[2]["period"] == "31/2" and rows[0]["period"] is None
    assert [row["level"] for row in rows] == [0, 1, 2, 3]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="negative period -1"):
        Box("a", -1)
    with pytest.raises(ValueError, match="'magic' is not among"):
        Box("a", 1, transfer="magic")


def test_parts_written_per_token():
    """Oracle 50: parameters written per token = sum of P / C."""
    boxes = [Box("a", 16, 96), Box("b", 64, 96), Box("c", None, 1000)]
    assert sum(box.parameters * box.frequency for box in boxes) == Fraction(96, 16) + Fraction(
        96, 64
    )
    assert np.isinf(Box("attention", 0).frequency)


def test_plain_numbers_are_parameters():
    """A level whose parameters are Python floats, as in the README."""
    level = levels.read_write(
        "sum",
        2,
        init=lambda params: params,
        read=lambda params, state, x: x + state,
        write=lambda params, state, x: state + x.sum(),
    )
    boxes = levels.describe(level, SGD, params=1.0, step_tokens=4)
    assert [(box.name, box.parameters) for box in boxes] == [("parameters", 1), ("sum", 1)]
    assert boxes[0].state_bytes == 4
