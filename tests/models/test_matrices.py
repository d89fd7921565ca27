"""Which weights are matrices, and that they are the matrices their layers multiply with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nestedjax import models, optim
from nestedjax.layers import Linear, param
from nestedjax.optim.matrices import fold, layouts, unfold

NANO = [name for name in models.PRESETS if name.endswith("_nano")]


@pytest.mark.parametrize("preset", NANO)
def test_every_weight_of_every_architecture_is_known(preset):
    model = nnx.eval_shape(lambda: models.build(preset, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    found = layouts(models.matrix_axes(model), params)
    stacked = [layout for layout in found if layout is not None]
    assert all(layout.matrix[0] == model.config.layers for layout in stacked)
    names = {layout.name for layout in stacked}
    assert not any("embedding" in name or "norm" in name or "conv" in name for name in names)
    paths = jax.tree_util.tree_leaves_with_path(params)
    assert len(paths) == len(found) > len(stacked) > 3


@pytest.mark.parametrize(
    ("inputs", "outputs", "axes"),
    [
        ((6,), (2, 3), ("embed", "heads", "head_dim")),
        ((2, 3), (6,), ("heads", "head_dim", "embed")),
        ((6,), (4,), ("embed", "mlp")),
    ],
)
def test_the_matrix_is_what_the_layer_multiplies_with(inputs, outputs, axes):
    layer = Linear(inputs, outputs, axes, dtype="float32", rngs=nnx.Rngs(0))
    (layout,) = layouts(models.matrix_axes(layer), nnx.state(layer, nnx.Param))
    x = jnp.arange(6.0)
    matrix = fold(layer.kernel[...], layout)
    np.testing.assert_allclose(matrix @ x, layer(x.reshape(inputs)).reshape(-1), atol=1e-5)
    np.testing.assert_array_equal(unfold(matrix, layout), layer.kernel[...])


def test_memories_are_one_matrix_a_head_and_optax_reads_the_same_labels():
    model = nnx.eval_shape(lambda: models.build("hope_nano", rngs=nnx.Rngs(0)))
    axes, params = models.matrix_axes(model), nnx.state(model, nnx.Param)
    shapes = {layout.name: layout.matrix for layout in layouts(axes, params) if layout is not None}
    config = model.config
    heads, width, hidden = config.memory.heads, config.memory.head_dim, config.memory.hidden
    memory = shapes["blocks.0.mixer.start.memories.key.inner.value"]
    assert memory == (config.layers, heads, hidden, width)
    muon = optax.contrib.muon(0.1, muon_weight_dimension_numbers=axes)
    state = jax.eval_shape(muon.init, params)
    momenta = jax.tree.leaves(state.inner_states["muon"].inner_state[0].mu)
    assert len(momenta) == len(shapes)


def test_a_weight_says_what_it_is():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) needs 2 axis names, got \('mlp',\)"):
        param(jnp.ones((2, 3)), ("mlp",), matrix=None, weight_decay=False)
    with pytest.raises(TypeError, match="matrix"):
        param(jnp.ones((2, 3)), ("mlp", "mlp"))
    gate = Linear((6,), (4,), ("embed", "heads"), dtype="float32", rngs=nnx.Rngs(0), matrix=False)
    assert models.matrix_axes(gate)["kernel"] is None
    decays = models.weight_decays(nnx.state(gate, nnx.Param))
    assert jax.tree.leaves(decays) == [True]
    assert optim.last_two({"w": jnp.ones((2, 3))})["w"] == optim.MatrixAxes(-2, -1)


def test_what_decays_and_which_group_steps_it():
    """Projections and the embedding; no norms, convolutions, biases and starts of memories."""
    model = nnx.eval_shape(lambda: models.build("hope_nano", rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    flags = jax.tree.leaves(models.weight_decays(params))
    decaying = {path for path, flag in zip(paths, flags, strict=True) if flag}
    expected = {p for p in paths if p == "embed.embedding" or p.endswith(".kernel")}
    assert decaying == {p for p in expected if "conv" not in p}
    groups = dict(zip(paths, jax.tree.leaves(models.labels(params, model.config)), strict=True))
    for path, group in groups.items():
        parts = path.split(".levels.")
        assert group == (f"cms.{parts[1][0]}" if len(parts) == 2 else ""), path
