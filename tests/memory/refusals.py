"""Numbers and tokens that do not fit a memory; run by `test_ranges`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nestedjax import levels, models
from nestedjax import memory as nm
from nestedjax.layers import MemoryMixer, gates
from nestedjax.models import DeltaNetConfig
from tests.plain import report

NAN, INF = float("nan"), float("inf")

# constructor of one number, its range, and numbers outside of it
RANGES = {
    "matrix: key_dim": (lambda n: nm.matrix(n, 2), "[1, inf)", (0, -1, 2.5)),
    "matrix: value_dim": (lambda n: nm.matrix(2, n), "[1, inf)", (0, True)),
    "matrix: scale": (lambda n: nm.matrix(2, 2, scale=n), "[0, inf)", (-1.0, NAN, INF)),
    "mlp: hidden": (lambda n: nm.mlp((2, n, 2)), "[1, inf)", (0, 2.5)),
    "mlp: output_scale": (lambda n: nm.mlp((2, 2), output_scale=n), "[0, inf)", (-1.0, NAN)),
    "residual_mlp": (lambda n: nm.residual_mlp((2, n, 2)), "[1, inf)", (0, -3)),
    "gated_mlp": (lambda n: nm.gated_mlp(2, n), "[1, inf)", (0, -3)),
    "polynomial": (nm.polynomial, "[0, inf)", (-1, 1.5)),
    "l2": (nm.l2, "(0, inf)", (0.0, -1.0, NAN, INF)),
    "lp": (nm.lp, "[1, inf)", (0.5, NAN, INF)),
    "smooth_lp": (nm.smooth_lp, "[1, inf)", (0.5, NAN)),
    "sharpness": (lambda n: nm.smooth_lp(2.0, sharpness=n), "(0, inf)", (0.0, NAN)),
    "epsilon": (lambda n: nm.smooth_lp(2.0, epsilon=n), "(0, inf)", (0.0, -1e-6)),
    "huber": (nm.huber, "(0, inf)", (0.0, -1.0, NAN, INF)),
    "huber_norm": (nm.huber_norm, "(0, inf)", (0.0, -1.0)),
    "huber_mixture": (nm.huber_mixture, "(0, inf)", (0.0, -1.0)),
    "robust": (nm.robust, "[0, inf)", (-0.1, NAN)),
    "kl": (nm.kl, "(0, inf)", (0.0, NAN)),
    "elastic_net": (nm.elastic_net, "[0, inf)", (-1.0, NAN)),
    "lq": (nm.lq, "(1, inf)", (1.0, NAN, INF)),
    "lq_printed": (nm.lq_printed, "(1, inf)", (1.0, 0.0)),
    "omega": (nm.omega, "[1, inf)", (0, 2.5)),
    "implicit_omega": (nm.implicit_omega, "[1, inf)", (0, -1)),
    "retention_decays": (nm.retention_decays, "[1, inf)", (0, 1.5)),
    "normaliser": (
        lambda n: nm.normalised_linear_attention(
            2, 2, chunk_size=2, feature_map=nm.elu_plus_one, epsilon=n
        ),
        "[0, inf)",
        (-1.0, NAN),
    ),
    "moneta: p": (lambda n: nm.moneta(nm.matrix(2, 2), chunk_size=2, p=n), "[1, inf)", (0.0,)),
    "moneta: q": (lambda n: nm.moneta(nm.matrix(2, 2), chunk_size=2, q=n), "(1, inf)", (0.5,)),
    "scaled": (gates.scaled, "(-inf, inf)", (NAN, INF)),
    "constant": (gates.constant, "(-inf, inf)", (NAN, INF)),
    "sigmoid: bias": (lambda n: gates.sigmoid(bias=n), "(-inf, inf)", (NAN,)),
    "sigmoid: maximum": (lambda n: gates.sigmoid(maximum=n), "(0, inf)", (0.0, NAN)),
    "sigmoid: scale": (lambda n: gates.sigmoid(scale=n), "[0, inf)", (-1.0, NAN)),
    "empty": (lambda n: gates.empty(rows=n), "[1, inf)", (0, 2.5)),
}
NAMED = {
    "delta_net": lambda n: nm.delta_net(2, 2, chunk_size=n),
    "gated_delta_net": lambda n: nm.gated_delta_net(2, 2, chunk_size=n),
    "hope_dot": lambda n: nm.hope_dot(2, 2, chunk_size=n),
    "hope_l2": lambda n: nm.hope_l2(2, 2, chunk_size=n),
    "linear_attention": lambda n: nm.linear_attention(2, 2, chunk_size=n),
    "retention_memory": lambda n: nm.retention_memory(2, 2, chunk_size=n),
    "longhorn": lambda n: nm.longhorn(2, 2, chunk_size=n),
    "longhorn_diagonal": lambda n: nm.longhorn_diagonal(2, 2, chunk_size=n),
    "oja_memory": lambda n: nm.oja_memory(2, 2, chunk_size=n),
    "omega_memory": lambda n: nm.omega_memory(nm.matrix(2, 2), window=2, chunk_size=n),
    "titans": lambda n: nm.titans(nm.matrix(2, 2), chunk_size=n),
    "ttt": lambda n: nm.ttt(nm.matrix(2, 2), chunk_size=n),
    "moneta": lambda n: nm.moneta(nm.matrix(2, 2), chunk_size=n),
    "yaad": lambda n: nm.yaad(nm.matrix(2, 2), chunk_size=n),
    "memora": lambda n: nm.memora(nm.matrix(2, 2), chunk_size=n),
}
RANGES |= {f"{n}: chunk_size": (make, "[1, inf)", (0, -1, 2.5)) for n, make in NAMED.items()}

T = 4
LEVEL, WEIGHTS = nm.gated_delta_net(4, 3, chunk_size=2), (jnp.zeros((3, 4)),)
TOKENS = nm.Tokens(
    keys=jnp.ones((T, 4)),
    values=jnp.ones((T, 3)),
    queries=jnp.ones((T, 4)),
    learning_rate=jnp.ones(T),
    decay=jnp.ones(T),
)


def step(**change):
    return lambda: LEVEL.step(WEIGHTS, LEVEL.init(WEIGHTS), TOKENS._replace(**change))


def batch():
    many = jax.tree.map(lambda a: jnp.stack([a, a]), TOKENS)
    return levels.run(LEVEL, WEIGHTS, LEVEL.init(WEIGHTS), many)


def mixed():
    with jax.enable_x64(True):
        wide = TOKENS._replace(values=TOKENS.values.astype(jnp.float64))
        weights = (jnp.zeros((3, 4), jnp.float32),)
        return LEVEL.step(weights, LEVEL.init(weights), wide)


def mixer(**slots):
    config = DeltaNetConfig(vocab=16, width=8, layers=1, hidden=8, heads=2)
    slots = {"learning_rate": gates.sigmoid(), "decay": gates.sigmoid()} | slots
    level = nm.gated_delta_net(4, 4, chunk_size=2)
    return lambda: MemoryMixer(config, level, heads=2, key_dim=4, rngs=nnx.Rngs(0), **slots)


def wide_model():
    config = DeltaNetConfig(vocab=16, width=8, layers=1, hidden=8, heads=2, dtype="float64")
    return models.build(config, rngs=nnx.Rngs(0))


TOKEN_CASES = {
    "scalar rate": (step(learning_rate=0.1), "Tokens.learning_rate is float 0.1"),
    "rate of no axis": (
        step(learning_rate=jnp.float32(0.1)),
        "learning_rate has shape (), expected [4], one number for each token",
    ),
    "list": (step(decay=[1.0] * T), "Tokens.decay is list"),
    "short decay": (step(decay=jnp.ones(3)), "decay has shape (3,), expected [4]"),
    "short values": (step(values=jnp.ones((3, 3))), "values has shape (3, 3), expected [4, feat"),
    "integers": (step(keys=jnp.ones((T, 4), int)), "Tokens.keys is int32[4, 4]"),
    "complex": (step(values=jnp.ones((T, 3), complex)), "Tokens.values is complex64"),
    "numpy float64": (step(values=np.ones((T, 3))), "Tokens.values is float64, which jax rounds"),
    "mixed widths": (mixed, "values is float64 and would be rounded to the weights' float32"),
    "batch": (batch, "for a batch use levels.run_batch or jax.vmap"),
    "offset": (step(rate_offset=jnp.ones(T)), "no use for Tokens.rate_offset"),
    "weights": (lambda: LEVEL.init(jnp.zeros((3, 4))), "initial weights are a ArrayImpl"),
    "integer weights": (lambda: LEVEL.init((jnp.zeros((3, 4), int),)), "initial weight 0 is int32"),
    "wide weights": (
        lambda: nm.matrix(2, 2).init(jax.random.key(0), jnp.float64),
        "dtype is float64, which jax rounds to float32",
    ),
    "wide model": (wide_model, "DeltaNetConfig: dtype is float64, which jax rounds to float32"),
    "decay above 1": (mixer(decay=gates.constant(1.5)), "decay: constant=1.5 must be a number in"),
    "one head's decay": (mixer(decay=gates.constant([0.5, -1.0])), "decay: constant=-1.0"),
    "decay up to 2": (mixer(decay=gates.sigmoid(maximum=2.0)), "decay: maximum of sigmoid=2.0"),
    "negative rate": (
        mixer(learning_rate=gates.constant(-1.0)),
        "learning_rate: constant=-1.0 must be a number in [0.0, inf)",
    ),
}
CASES = {name: case for name, (case, _) in TOKEN_CASES.items()} | {
    f"{name}={number!r}": (lambda make=make, number=number: make(number))
    for name, (make, _, numbers) in RANGES.items()
    for number in numbers
}

if __name__ == "__main__":
    report(CASES)
