"""Training speed and memory of HOPE and its peers at one size, on one CPU core.

Every row runs in a process of its own that is pinned to one core before JAX starts, so that its
peak memory is its own and a CPU-second is a second of that core. A step is the one of
`nestedjax train` (forward, backward, AdamW; float32) on random tokens, without document resets.
"""

import ctypes
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCAB, WIDTH, LAYERS, HEADS, CHUNK = 512, 256, 4, 4, 64


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of the benchmark.

    Attributes:
      model: a name in `configurations()`.
      length: tokens of each sequence.
      batch: sequences.
      steps: steps that are timed, after one that compiles and one that warms up.
    """

    model: str
    length: int = 1024
    batch: int = 4
    steps: int = 5


def configurations() -> dict[str, Any]:
    """The models that are compared: vocab 512, width 256, 4 layers, 4 heads, chunks of 64.

    `hope` and `hope_linear` have the memories of their presets at these sizes; `hope_published` has
    the write as published.
    """
    from nestedjax.layers import SelfModifyingConfig
    from nestedjax.models import (
        PRESETS,
        AttentionConfig,
        CMSConfig,
        HopeAttentionConfig,
        HopeConfig,
        TransformerConfig,
    )

    head = WIDTH // HEADS
    published = SelfModifyingConfig(heads=HEADS, head_dim=head, hidden=head, chunk_size=CHUNK)

    def remembers(name: str) -> SelfModifyingConfig:
        preset = PRESETS[name]
        assert isinstance(preset, HopeConfig)
        return dataclasses.replace(
            preset.memory,
            heads=HEADS,
            head_dim=head,
            hidden=head,
            chunk_size=CHUNK,
            gate_gain=head**0.5,
        )

    memories = {
        "hope": remembers("hope_nano"),
        "hope_linear": remembers("hope_linear_nano"),
        "hope_published": published,
    }
    cms = CMSConfig(periods=(None, None, None, None), hidden=WIDTH)
    attention = AttentionConfig(heads=HEADS, context=1024)
    return {
        **{
            name: HopeConfig(VOCAB, WIDTH, LAYERS, memory, cms, remat="tokens")
            for name, memory in memories.items()
        },
        "hope_attention": HopeAttentionConfig(VOCAB, WIDTH, LAYERS, attention, cms),
        "transformer": TransformerConfig(VOCAB, WIDTH, LAYERS, 3 * WIDTH, attention),
    }


MODELS = ("hope", "hope_linear", "hope_published", "hope_attention", "transformer")


def measure(workload: Workload, *, config: Any = None) -> dict[str, Any]:
    """Time training steps in this process, on the cores it may use.

    Args:
      workload: what to run.
      config: a model configuration; default the one that `workload.model` names.

    Returns:
      A row: `model`, `tokens_per_cpu_second` (of the median step), `peak_rss_mb` (of the process,
      Python and JAX included, MiB), `compile_rss_mb` (the peak when the step had been compiled;
      what the compiler freed goes back to the system before the first step), `length`, `batch`,
      `parameters`, `cpu_seconds` (of each step), `compile_seconds`.
    """
    import jax
    import jax.numpy as jnp

    dispatch, state, parameters = _train_step(workload, config or configurations()[workload.model])
    shape = (1, 1, workload.batch, workload.length + 1)
    drawn = jax.random.randint(jax.random.key(1), shape, 0, VOCAB, jnp.int32)
    tokens = {"tokens": drawn[..., :-1], "targets": drawn[..., 1:], "resets": None}
    tokens["mask"] = jnp.ones((1, 1, workload.batch, workload.length), bool)
    healthy = jnp.asarray(True)
    started = time.process_time()
    compiled = dispatch.lower(state, healthy, tokens).compile()
    compile_seconds = time.process_time() - started
    compile_rss = _peak_rss()
    _return_freed_memory()
    seconds = []
    for _ in range(workload.steps + 1):
        started = time.process_time()
        state, healthy, _ = jax.block_until_ready(compiled(state, healthy, tokens))
        seconds.append(time.process_time() - started)
    if not bool(healthy):
        raise RuntimeError(f"{workload}: a step was not finite, so its time means nothing")
    return {
        "model": workload.model,
        "tokens_per_cpu_second": workload.batch * workload.length / statistics.median(seconds[1:]),
        "peak_rss_mb": _peak_rss(),
        "compile_rss_mb": compile_rss,
        "length": workload.length,
        "batch": workload.batch,
        "parameters": parameters,
        "cpu_seconds": seconds[1:],
        "compile_seconds": compile_seconds,
    }


def _peak_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _return_freed_memory() -> None:
    """glibc keeps what the compiler freed, which the steps would then seem to need."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _train_step(workload: Workload, config: Any) -> tuple[Any, Any, int]:
    """The training step of a run, its first state and its number of parameters."""
    from nestedjax import models
    from nestedjax import run as layer
    from nestedjax.run import DataConfig, OptimizerConfig, RunConfig
    from nestedjax.training import make_dispatch

    data = DataConfig(length=workload.length, batch=workload.batch)
    run = RunConfig("peers", config, data, OptimizerConfig(warmup=0))
    built = layer.build(run)
    tx, _ = layer.optimizer(run, built.model)
    state = layer.new_state(run, built, tx)
    count = models.parameter_count(built.model)
    return make_dispatch(layer.language_loss(built.definition), tx), state, count


def isolated(workload: Workload, *, core: int) -> dict[str, Any]:
    """`measure` in a fresh process pinned to one core, with the allocator of the command line.

    Args:
      workload: what to run.
      core: index of the core.

    Returns:
      The row of `measure`, and `allocator`: what `nestedjax.cli.allocator.keep_pages` returned.

    Raises:
      RuntimeError: with the last lines of the process, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        given = (dataclasses.asdict(workload), core, str(path))
        # It starts as a command does: what is measured is what `nestedjax train` runs.
        code = (
            "from nestedjax.cli.allocator import keep_pages; allocator = keep_pages();"
            f" from nestedjax.benchmarks import peers; peers._row(*{given!r}, allocator)"
        )
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            last = " | ".join(done.stderr.strip().splitlines()[-3:])
            raise RuntimeError(f"{workload.model} at length {workload.length} failed: {last}")
        return json.loads(path.read_text())


def _row(workload: dict[str, Any], core: int, path: str, allocator: str) -> None:
    """The whole of a row's process."""
    os.sched_setaffinity(0, {core})  # before JAX sizes its thread pools
    row = measure(Workload(**workload)) | {"allocator": allocator}
    Path(path).write_text(json.dumps(row))
