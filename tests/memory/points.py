"""The table of combinations that every contract runs over, and random tokens for them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from nestedjax import memory as nm

DIM = 4

ARCHITECTURES = {
    "matrix": nm.matrix(DIM, DIM, scale=0.5),
    "mlp": nm.mlp((DIM, 6, DIM)),
    "deep": nm.residual_mlp((DIM, 5, 6, DIM), output_scale=0.5),
    "gated": nm.gated_mlp(DIM, 5, output_scale=0.5),
}
OBJECTIVES = {
    "dot": nm.dot(),
    "l2": nm.l2(),
    "lp": nm.lp(3.0),
    "smooth_lp": nm.smooth_lp(1.5),
    "huber": nm.huber(),
    "huber_norm": nm.huber_norm(0.7),
    "huber_mixture": nm.huber_mixture(0.7),
    "robust": nm.robust(0.3),
    "oja": nm.oja(),
}
RETENTIONS = {
    "none": nm.none(),
    "decay": nm.decay(),
    "kl": nm.kl(2.0),
    "elastic_net": nm.elastic_net(0.1),
    "lq": nm.lq(4.0),
    "lq_printed": nm.lq_printed(4.0),
    "bregman_sigmoid": nm.bregman_sigmoid(),
}
RULES = {
    "gradient": nm.gradient(),
    "momentum": nm.momentum(),
    "delta": nm.delta(),
    "explicit_delta": nm.explicit_delta(),
    "implicit_delta": nm.implicit_delta(),
    "closed_form_delta": nm.closed_form_delta(),
    "coupled_delta": nm.coupled_delta(),
    "input_delta": nm.input_delta(),
    "functional_delta": nm.functional_delta(),
    "delta+momentum": nm.with_momentum(nm.delta()),
    "diagonal_closed_form_delta": nm.diagonal_closed_form_delta(),
    "mean_gradient": nm.mean_gradient(),
    "omega": nm.omega(3),
    "implicit_omega": nm.implicit_omega(3),
}


def _defined(names):
    try:
        nm.plan(*entries(names))
    except ValueError:
        return False
    return True


def entries(names):
    architecture, objective, retention, rule = names
    return (
        ARCHITECTURES[architecture],
        OBJECTIVES[objective],
        RETENTIONS[retention],
        RULES[rule],
    )


# The whole product; every entry of every menu with the plainest of the others, and every rule
# through a deep memory; and one point for every execution with every kind of state, for the
# contracts that compile most.
PRODUCT = [
    names
    for names in itertools.product(ARCHITECTURES, OBJECTIVES, RETENTIONS, RULES)
    if _defined(names)
]
POINTS = [
    names
    for names in PRODUCT
    if names[0] == "matrix"
    and sum(a != b for a, b in zip(names[1:], ("l2", "decay", "gradient"), strict=True)) <= 1
    or names[0] == "deep"
    and names[1:3] == ("l2", "decay")
] + [
    ("matrix", "oja", "decay", "omega"),
    ("mlp", "dot", "none", "delta"),
    ("mlp", "huber", "decay", "momentum"),
    ("matrix", "l2", "none", "mean_gradient"),
    ("mlp", "huber", "none", "mean_gradient"),
    ("gated", "l2", "decay", "delta+momentum"),
    ("gated", "smooth_lp", "decay", "omega"),
    ("deep", "l2", "kl", "momentum"),
    ("deep", "huber_norm", "bregman_sigmoid", "omega"),
]
CORE = [
    ("matrix", "dot", "none", "gradient"),
    ("matrix", "l2", "decay", "implicit_omega"),
    ("matrix", "oja", "decay", "gradient"),
    ("mlp", "huber", "decay", "omega"),
    ("mlp", "huber", "none", "mean_gradient"),
    ("deep", "l2", "decay", "delta+momentum"),
    ("deep", "l2", "kl", "momentum"),
    ("deep", "robust", "elastic_net", "gradient"),
    ("gated", "l2", "decay", "input_delta"),
]


def level(names, chunk_size, **options):
    return nm.associative_memory(*entries(names), chunk_size=chunk_size, **options)


def params(names, dtype=jnp.float32, seed=0):
    return ARCHITECTURES[names[0]].init(jax.random.key(seed), dtype)


def tokens(names, length, dtype=np.float32, seed=1):
    """Unit keys, values of size 1, learning rates near 0.1, the gates that the entries need."""
    architecture, objective, retention, rule = entries(names)
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(length, architecture.key_dim))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)

    def gate(low, high, used):
        return jnp.asarray(rng.uniform(low, high, length), dtype) if used else None

    return nm.Tokens(
        keys=jnp.asarray(keys, dtype),
        values=jnp.asarray(rng.normal(size=(length, architecture.value_dim)), dtype),
        queries=jnp.asarray(rng.normal(size=(length, architecture.key_dim)), dtype),
        learning_rate=jnp.asarray(rng.uniform(0.02, 0.15, length), dtype),
        decay=gate(0.8, 0.99, retention.decay != "unused"),
        momentum=gate(0.3, 0.9, rule.momentum),
        threshold=gate(0.5, 1.0, objective.token_threshold),
        # below -1/4 the rates of a chunk's later tokens are 0
        rate_offset=gate(-0.4, 0.2, rule.mean and objective.token_threshold),
    )
