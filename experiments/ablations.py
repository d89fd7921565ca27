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
from typing import Any

from flax import nnx

from experiments import babi, recall, reports, trials
from experiments import small_models as small
from nestedjax import layers, models

BASE = small.LINEAR  # the memory that the rows change
BLOCKS = (1, 2, 4, 8)  # steps between two writes of a continuum block


@dataclasses.dataclass(frozen=True)
class WithoutConvolution(models.HopeConfig):
    """HOPE whose memory sees its input as it is."""

    def block(self, *, rngs: nnx.Rngs) -> models.Block:
        """The self-modifying memory without its convolutions, then the continuum memory."""
        mixer = layers.self_modifying_mixer(self, self.memory, rngs=rngs)
        mixer.convolutions = nnx.data({})
        return models.Block(self, mixer, layers.ContinuumMemory(self, self.cms, rngs=rngs))


def configs(vocab: int, *, step_tokens: int) -> dict[str, models.ModelConfig]:
    """The rows, by name: HOPE, HOPE with one thing changed, Transformer++.

    Args:
      vocab: tokens of the task.
      step_tokens: rows times tokens of a training batch.
    """
    periods = tuple(steps * step_tokens for steps in BLOCKS)
    four = models.CMSConfig(periods, hidden=small.HIDDEN // len(BLOCKS), mlp="swiglu")

    def hope(memory: layers.SelfModifyingConfig = BASE, **changes: Any) -> models.ModelConfig:
        return small.hope(vocab, memory, **changes).with_continuum(four)

    def rule(**changes: Any) -> models.ModelConfig:
        return hope(rule=dataclasses.replace(BASE.rule, **changes))

    full = hope()
    return {
        "hope": full,
        "no_writes": hope(writes=False),
        # The delta rule is DGD on the dot objective: what is left of it without DGD.
        "no_dgd": rule(objective="dot"),
        # Momentum has no decay to the start: compare it with "decay_to_zero".
        "momentum": hope(momentum=True, rule=dataclasses.replace(BASE.rule, decay_to="zero")),
        "decay_to_zero": rule(decay_to="zero"),
        "no_decay": hope(decay_bias=80.0),  # its sigmoid is 1 in float32, without a slope
        "no_cms": small.hope(vocab, BASE),
        "no_convolution": WithoutConvolution(
            vocab, full.width, full.layers, BASE, four, **small.EMBEDDING
        ),
        "key_static": hope(static=("key",)),
        "value_static": hope(static=("value",)),
        "learning_rate_static": hope(static=("learning_rate",)),
        "decay_static": hope(static=("decay",)),
        "projections_static": hope(static=small.PROJECTIONS),
        "query_adaptive": hope(adaptive_query=True),
        "one_learning_rate": hope(projection_learning_rate=None),
        "values_shared": rule(values="shared"),
        "targets_not_normalised": rule(targets="generated", inner_clip=1.0),
        "read_before_write": hope(read="running_prev"),
        "read_chunk_start": hope(read="anchor"),
        "chunk_4": hope(chunk_size=4),
        "chunk_16": hope(chunk_size=16),
        "projections_every_16": hope(projection_chunk_size=16),
        "write_as_published": hope(rule=layers.RuleConfig()),
        "mlp": hope(small.MLP),
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
        return dataclasses.replace(recall.PLANS[scale]("64x8"), until=None)
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
