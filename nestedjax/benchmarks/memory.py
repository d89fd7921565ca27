"""What a longer text costs in memory: the compiler's temporaries of HOPE, forward and backward.

Nothing is run: two lengths are compiled for this device, and the difference is counted in chunks
and in states (the fast weights of one sequence, all layers). The model is that of `bench peers`.

    nestedjax bench memory --lengths 4096 16384
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

REMATS = ("full", "tokens")


def measure(
    lengths: Sequence[int] = (4096, 16384), *, remats: Sequence[str] = REMATS, config: Any = None
) -> list[dict[str, Any]]:
    """One row for each setting of `remat`.

    Args:
      lengths: two numbers of tokens, in whole chunks; the batch is one sequence.
      remats: settings of the model's `remat`.
      config: a `HopeConfig`; default that of `bench peers`.

    Returns:
      Rows of `remat`, `lengths`, `temp_bytes` (at each), `state_bytes`, `bytes_per_chunk`, and
      `states_per_chunk`, the same in units of the state.
    """
    import jax

    from nestedjax import models
    from nestedjax.benchmarks import peers

    config = peers.configurations()["hope"] if config is None else config
    rows = []
    for remat in remats:
        changed = dataclasses.replace(config, remat=remat)
        make = lambda c=changed: models.create(c)  # noqa: E731
        definition, weights = models.split(models.abstract(make))
        state = jax.eval_shape(lambda make=make: make().init_state(1)[0]["mixer"]["memory"].state)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        temporaries = [_temporaries(definition, weights, length) for length in lengths]
        chunks = (lengths[1] - lengths[0]) / config.memory.chunk_size
        per_chunk = (temporaries[1] - temporaries[0]) / chunks
        rows.append(
            {
                "remat": remat,
                "lengths": list(lengths),
                "temp_bytes": temporaries,
                "state_bytes": size,
                "bytes_per_chunk": per_chunk,
                "states_per_chunk": per_chunk / size,
            }
        )
    return rows


def _temporaries(definition, weights, length: int) -> int:
    import jax
    import jax.numpy as jnp

    from nestedjax import run

    loss = run.language_loss(definition)
    tokens, mask = (jax.ShapeDtypeStruct((1, length), dtype) for dtype in (jnp.int32, bool))
    batch = {"tokens": tokens, "targets": tokens, "mask": mask, "resets": None}
    gradient = jax.jit(jax.grad(lambda weights, batch: loss(weights, batch, None)[0]))
    memory = gradient.lower(weights, batch).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for a terminal."""
    first, second = rows[0]["lengths"]
    lines = [f"{'remat':8}{first:>9,}{second:>9,} tokens, MiB{'chunk, MiB':>12}{'in states':>11}"]
    for row in rows:
        low, high = (size / 2**20 for size in row["temp_bytes"])
        chunk = f"{row['bytes_per_chunk'] / 2**20:>12.2f}{row['states_per_chunk']:>11.2f}"
        lines.append(f"{row['remat']:8}{low:>9,.0f}{high:>9,.0f}{'':12}{chunk}")
    return "\n".join(lines)
