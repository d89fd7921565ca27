"""Ablations of HOPE, trained: which of its parts carry recall and bAbI (spec G6, Table 6).

Claim under test: each part helps, as in Table 6 of the paper (1.3B parameters, perplexity: HOPE
12.24; without DGD 13.41, momentum 13.58, weight decay 13.71, CMS 13.04; with the projections of k,
v or q static 13.77, 13.90, 12.19). Every row is trained from scratch, so that it says what a part
is worth and not what is lost when it is switched off afterwards. Transformer++ with and without
HOPE's convolution says what the convolution alone is worth.

Command:   python -m experiments.ablations --scale cpu   (a part: --tasks recall --models hope)
Data:      recall of 8 pairs in 64 tokens (`experiments.recall`); bAbI task 1 (`experiments.babi`)
Protocol:  recall and bAbI as in those experiments, at one learning rate each, for every row;
           HOPE's continuum memory has four blocks that are stepped every 1, 2, 4 and 8 steps
Hardware:  2 CPU cores; --scale gpu and tpu are meant for one chip
Output:    a table, `ablations.json`, `ablations.png` and the finished cells in --out (started
           again, it goes on); what was found is in LOG.md
"""

import dataclasses
import functools
import math
from pathlib import Path

from flax import nnx

from experiments import babi, recall, reports, trials
from experiments import small_models as small
from nestedjax import layers, models

BLOCKS = (1, 2, 4, 8)  # steps between two writes of a continuum block


@dataclasses.dataclass(frozen=True)
class WithoutConvolution(models.HopeConfig):
    """HOPE whose memory sees its input as it is."""

    def block(self, *, rngs: nnx.Rngs) -> models.Block:
        """The self-modifying memory without its convolution, then the continuum memory."""
        mixer = layers.self_modifying_mixer(self, self.memory, rngs=rngs)
        mixer.input_conv = nnx.data(None)
        return models.Block(self, mixer, layers.ContinuumMemory(self, self.cms, rngs=rngs))


def configs(vocab: int, *, step_tokens: int) -> dict[str, models.ModelConfig]:
    """The rows, by name: HOPE, HOPE with one thing changed, Transformer++.

    Args:
      vocab: tokens of the task.
      step_tokens: rows times tokens of a training batch.
    """
    periods = tuple(steps * step_tokens for steps in BLOCKS)
    four = models.CMSConfig(periods, hidden=small.HIDDEN // len(BLOCKS), mlp="swiglu")
    one = small.hope(vocab)
    full = one.with_continuum(four)

    def changed(**memory) -> models.ModelConfig:
        return dataclasses.replace(full, memory=dataclasses.replace(full.memory, **memory))

    return {
        "hope": full,
        "no_dgd": changed(dgd="none"),
        "no_momentum" if full.memory.momentum else "momentum": changed(
            momentum=not full.memory.momentum
        ),
        "no_decay": changed(decay_bias=80.0),  # its sigmoid is 1 in float32, without a slope
        "no_cms": one,
        "no_convolution": WithoutConvolution(vocab, full.width, full.layers, full.memory, full.cms),
        "values_shared": changed(values="shared"),
        "query_adaptive": changed(adaptive_query=True),
        "read_before_write": changed(read="running_prev"),
        "read_chunk_start": changed(read="anchor"),
        "chunk_4": changed(chunk_size=4),
        "chunk_16": changed(chunk_size=16),
        "projections_every_16": changed(projection_chunk_size=16),
        "transformer": small.transformer(vocab),
        "transformer_no_convolution": small.transformer(vocab, conv=0),
    }


def tasks(length: int, pairs: int):
    """Name -> what makes the task."""

    def memory(data: Path = babi.DATA) -> trials.Task:
        del data  # generated
        return recall.make(length, pairs)

    return {"recall": memory, "qa1": functools.partial(babi.make, "qa1", babi.LENGTHS["qa1"])}


TASKS = {name: tasks(64, 8) for name in ("cpu", "gpu", "tpu")}
TASKS = {"smoke": {"recall": tasks(32, 4)["recall"]}, **TASKS}


def plan(task: str, scale: str) -> trials.Plan:
    """The training of every row: as in the task's own experiment, at one learning rate."""
    if task == "recall":
        return recall.PLANS[scale]("64x8")
    return dataclasses.replace(babi.PLANS[scale](task), rates=(4e-3,))


PLANS = {scale: functools.partial(plan, scale=scale) for scale in TASKS}


def main() -> None:
    reports.run(
        "ablations",
        __doc__,
        tasks=TASKS,
        plans=PLANS,
        configs=lambda task: configs(task.vocab, step_tokens=math.prod(task.shape)),
        names=tuple(configs(2, step_tokens=1)),
        data=babi.DATA,
        least=0.9,
        title="Ablations: answers right, by training step",
    )


if __name__ == "__main__":
    main()
