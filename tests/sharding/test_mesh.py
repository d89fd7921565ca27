"""The mesh, the rule table, and what is refused; nothing here is compiled."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from nestedjax import sharding
from nestedjax.sharding import RULES, MeshError, make_mesh, spec_of

SHAPE = {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}


def test_mesh_axes():
    mesh = make_mesh("data=2, fsdp=2,tensor=2")
    assert dict(mesh.shape) == SHAPE and set(mesh.axis_types) == {AxisType.Auto}
    mesh = make_mesh({"sequence": 8}, explicit=True)
    assert mesh.shape["sequence"] == 8 and set(mesh.axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=3", "needs 3 devices and there are 8; data=8 fits"),
        ("data=4,tensor=4", "needs 16 devices and there are 8; data=2,tensor=4 fits"),
        ("fsdp=3,tensor=2", "needs 6 devices and there are 8; data=4,tensor=2 fits"),
        ("model=8", "no axis 'model'; its axes are data, fsdp, tensor, sequence"),
        ("data=0", "data=0: the size of a mesh axis is a positive integer"),
        ("data", "write axis=size"),
        ("data=-8", "write axis=size"),
        ("data=2,data=4", "gives data twice"),
    ],
)
def test_a_mesh_that_does_not_fit(text, message):
    with pytest.raises(MeshError, match=message) as error:
        make_mesh(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("vocab", "embed"), P("tensor", "fsdp")),
        (("layers", "embed", "heads", "head_dim"), P(None, "fsdp", "tensor", None)),
        (("layers", "mlp", "embed"), P(None, "tensor", "fsdp")),
        (("layers", "heads", "hidden", "head_dim"), P(None, "tensor", "fsdp", None)),
        # the batch has taken fsdp, so activations and fast states do not split it again
        (("batch", "time", "embed"), P(("data", "fsdp"), None, None)),
        (("batch", "heads", "hidden", "head_dim"), P(("data", "fsdp"), "tensor", None, None)),
        (("batch", None, "vocab"), P(("data", "fsdp"), None, "tensor")),
        (("layers", "taps", "embed"), P(None, None, "fsdp")),
    ],
)
def test_rules(axes, spec):
    assert spec_of(axes, SHAPE) == spec
    assert spec_of(axes, dict.fromkeys(SHAPE, 1)) == P(*[None] * len(axes))


def test_rules_name_axes_of_the_mesh():
    assert {axis for axes in RULES.values() for axis in axes} == set(sharding.AXES)
    with pytest.raises(ValueError, match="no rule for the logical axis 'ember'.*vocab"):
        spec_of(("ember",), SHAPE)


def test_what_does_not_divide():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    tree = {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
    with pytest.raises(MeshError, match="weight w has heads=3.*tensor=2; make it a multiple of 2"):
        sharding.shardings_of(tree, {"w": P("embed", "heads")}, mesh)
    batch = sharding.batch_sharding(mesh)
    with pytest.raises(MeshError, match="a batch has batch=6.*data=2 . fsdp=2.*multiple of 4"):
        sharding.check_fits((6, 16), batch, name="a batch", axes=("batch", "time"))
    with jax.set_mesh(mesh):  # one sampled sequence: not split, not refused
        assert sharding.constrain(jnp.ones((1, 4)), "batch", "embed").sharding.spec[0] is None


def test_what_an_optimizer_keeps_lies_like_its_parameter():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    params = {"a": {"w": jnp.ones((4, 2))}, "w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    axes = {"a": {"w": P("embed", "mlp")}, "w": P("mlp", "embed"), "b": P("mlp")}
    placed = sharding.shardings_of(params, axes, mesh)
    kept = {"mu": params, "count": jnp.zeros(()), "factored": {"w": jnp.ones(4)}}
    found = sharding.like_params(kept, params, placed, mesh)
    assert found["mu"] == placed
    assert found["count"].spec == found["factored"]["w"].spec == P()


def test_without_a_mesh_nothing_happens():
    x, index = jnp.arange(6.0).reshape(2, 3), jnp.array([[1, 0]])
    assert sharding.constrain(x, "batch", "embed") is x
    assert sharding.gathered(x, ("embed", "mlp")) is x
    assert sharding.over_batch({"x": x})["x"] is x
    assert (sharding.lookup(x, index) == x[index]).all()
    assert (sharding.contract(x, x.T, 1) == x @ x.T).all()
