"""Calls of every operation that do not fit; run by `test_refusals`."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import attention
from pallas_kernels.delta_rule import delta_chunk, delta_rule
from pallas_kernels.mlp_memory import FastWeights, Rule, mlp_memory
from pallas_kernels.selective_scan import selective_scan
from tests.plain import report

T, N, M = 5, 4, 3
ROWS, GATE = jnp.ones((T, N)), jnp.ones(T)
DELTA = dict(x=ROWS, error=jnp.ones((T, M)), learning_rate=GATE, initial=jnp.ones((M, N)))
WEIGHTS = FastWeights(jnp.ones((1, M, N)), jnp.ones((1, N, M)), None, None)
DEEP = dict(keys=ROWS, values=ROWS, initial=WEIGHTS, learning_rate=GATE, decay=GATE)
SCAN = dict(x=ROWS, step=ROWS, decay=-jnp.ones((N, M)), write=jnp.ones((T, M)))
SCAN |= dict(read=jnp.ones((T, M)))
HEADS = dict(queries=jnp.ones((1, T, 2, N)), keys=jnp.ones((1, T, 2, N)))
HEADS |= dict(values=jnp.ones((1, T, 2, N)))


def call(operation, given, **change):
    return lambda: operation(**{**given, **change})


# name -> (call, what the message says)
EXPECTED = {
    "scalar rate": (call(delta_rule, DELTA, learning_rate=0.1), "learning_rate is float 0.1"),
    "rate of no axis": (
        call(delta_rule, DELTA, learning_rate=jnp.float32(0.1)),
        "learning_rate has shape (), expected [..., T], one number for each token",
    ),
    "list": (call(delta_rule, DELTA, decay=[1.0] * T), "decay is list [1.0, 1.0"),
    "integers": (call(delta_rule, DELTA, x=jnp.ones((T, N), int)), "x is int32[5, 4]"),
    "complex": (call(delta_chunk, DELTA, error=jnp.ones((T, M), complex)), "error is complex64"),
    "float64": (call(delta_rule, DELTA, x=np.ones((T, N))), "x is float64, which jax rounds"),
    "one axis": (call(delta_rule, DELTA, x=GATE), "x has shape (5,), expected [..., T, features]"),
    "other tokens": (
        call(delta_rule, DELTA, error=jnp.ones((T - 1, M))),
        "delta_rule: error has 4 tokens where x has 5",
    ),
    "queries' tokens": (call(delta_rule, DELTA, queries=ROWS[1:]), "queries has 4 tokens"),
    "queries' width": (call(delta_rule, DELTA, queries=ROWS[:, 1:]), "queries have 3 features"),
    "batches": (
        call(delta_rule, DELTA, decay=jnp.ones((2, T)), erase=jnp.ones((3, T))),
        "leading axes do not broadcast: x (), error (), learning_rate (), decay (2,), erase (3,)",
    ),
    "chunk of a half": (call(delta_rule, DELTA, chunk_size=2.5), "chunk_size=2.5 must be an int"),
    "deep scalar rate": (call(mlp_memory, DEEP, learning_rate=0.1), "learning_rate is float 0.1"),
    "deep one axis": (call(mlp_memory, DEEP, keys=GATE), "keys has shape (5,)"),
    "deep integers": (call(mlp_memory, DEEP, values=jnp.ones((T, N), int)), "values is int32"),
    "deep gate": (call(mlp_memory, DEEP, decay=jnp.ones(3)), "decay has shape (3,), expected"),
    "deep clip": (
        call(mlp_memory, DEEP, rule=Rule(inner_clip=-1.0)),
        "inner_clip=-1.0 must be a number in (0, inf)",
    ),
    "deep rate": (
        call(mlp_memory, DEEP, rule=Rule(max_learning_rate=float("nan"))),
        "max_learning_rate=nan",
    ),
    "scan scalar": (call(selective_scan, SCAN, step=0.1), "step is float 0.1"),
    "scan complex": (call(selective_scan, SCAN, x=jnp.ones((T, N), complex)), "x is complex64"),
    "attention integers": (
        call(attention, HEADS, keys=jnp.ones((1, T, 2, N), int)),
        "attention: keys is int32",
    ),
    "attention axes": (call(attention, HEADS, queries=ROWS), "[B, T, H, K]"),
    "documents": (call(attention, HEADS, documents=[0] * T), "documents is a list, expected"),
    "prefix": (call(attention, HEADS, prefix=1.5), "prefix=1.5 must be an int"),
}
CASES = {name: case for name, (case, _) in EXPECTED.items()}

if __name__ == "__main__":
    report(CASES)
