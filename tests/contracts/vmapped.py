"""The named memories under nested `jax.vmap`s, and an optimizer over three stacked axes.

`test_vmaps` runs this in a process of its own, with XLA as users have it: where the compiler
aborts, the process ends, and the last name printed says for whom.
"""

import jax
import numpy as np

from nestedjax import levels, memory, optim
from tests.vmaps import check_vmaps

SIZE, CHUNK = 4, 20  # tokens: more than the blocks that the triangular inverse merges
DEEP = memory.residual_mlp((SIZE, SIZE, SIZE))
# each with its initial weights' shapes, and the gates that it takes beside the learning rate
MATRIX, MLP, NORMALISED = ((SIZE, SIZE),), DEEP.shapes, ((SIZE + 1, SIZE),)
MEMORIES = {
    "linear_attention": (memory.linear_attention, MATRIX, ()),
    "retention_memory": (memory.retention_memory, MATRIX, ("decay",)),
    "delta_net": (memory.delta_net, MATRIX, ()),
    "gated_delta_net": (memory.gated_delta_net, MATRIX, ("decay",)),
    "hope_dot": (memory.hope_dot, MATRIX, ("decay",)),
    "hope_l2": (memory.hope_l2, MATRIX, ("decay",)),
    "longhorn": (memory.longhorn, MATRIX, ()),
    "oja_memory": (memory.oja_memory, MATRIX, ("decay",)),
    "titans": (memory.titans, MLP, ("decay", "momentum")),
    "moneta": (memory.moneta, MLP, ()),
    "yaad": (memory.yaad, MLP, ("decay", "threshold")),
    "memora": (memory.memora, MLP, ()),
    "omega_memory": (
        lambda deep, chunk_size: memory.omega_memory(deep, window=2, chunk_size=chunk_size),
        MLP,
        ("decay",),
    ),
    "normalised_linear_attention": (
        lambda dk, dv, chunk_size: memory.normalised_linear_attention(
            dk, dv, chunk_size=chunk_size, feature_map=memory.elu_plus_one
        ),
        NORMALISED,
        (),
    ),
    "residual_mlp with delta": (
        lambda deep, chunk_size: memory.associative_memory(
            deep, memory.l2(), memory.decay(), memory.delta(), chunk_size=chunk_size
        ),
        MLP,
        ("decay",),
    ),
}


def check_memory(make, shapes, gates):
    """Forward alone: with the backward pass the compiler takes other ways."""
    level = make(*((DEEP,) if shapes == MLP else (SIZE, SIZE)), chunk_size=CHUNK)

    def draw(i):
        rng = np.random.default_rng(i)
        tokens = {n: rng.normal(size=(CHUNK, SIZE)) / 2 for n in ("keys", "values", "queries")}
        tokens |= {n: rng.uniform(0.2, 0.9, CHUNK) for n in ("learning_rate", *gates)}
        params = tuple(rng.normal(size=shape) / 2 for shape in shapes)
        return jax.tree.map(np.float32, (params, memory.Tokens(**tokens)))

    def run(given):
        params, x = given
        return levels.run(level, params, level.init(params), x)[0]

    check_vmaps(run, draw, depths=(2, 3), gradient=False, rtol=1e-4, atol=1e-4)


def check_stack():
    """The products of singular vectors of as many matrices as three stacked axes hold."""
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 5)).astype(np.float32)
    tx = optim.scale_by_learned_preconditioner()
    stacks = jax.jit(lambda x: tx.update(x, tx.init(x), x)[0])
    alone = jax.jit(jax.vmap(lambda x: tx.update(x, tx.init(x), x)[0]))(x.reshape(24, 5, 5))
    np.testing.assert_allclose(stacks(x).reshape(24, 5, 5), alone, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    for name, case in MEMORIES.items():
        print(name, flush=True)
        check_memory(*case)
    print("a stack of three axes", flush=True)
    check_stack()
    print("all")
