"""How a self-modifying memory is written: a menu, of which the first choices are the paper's."""

import dataclasses
from typing import Literal

from nestedjax.fields import Positive, check_fields
from pallas_kernels.mlp_memory import Rule, check_rule


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """What one token writes into a memory (spec C6.5).

    Attributes:
      objective: inner objective: "l2" (halved) or "dot", whose gradients are those of the chunk's
        start, or "delta": l2 at the weights of the moment, so that a write corrects its error once.
        V, whose gradient at the moment has no parallel form, takes that of the chunk's start.
      values: "self" (each memory generates its own target) or "shared" (the generated value).
      targets: "generated", or "unit": a generated target is divided by its norm, without which
        a memory that is written at rates near 1 runs away.
      written: "both" matrices of an MLP, or "outer": U alone. Then V stays at its start.
      dgd: which matrices erase along their input: "layerwise" (R1), "input_only" (R2),
        "output_only" (U), "none" (R3) or "functional" (R4). With "delta" U is erased by the
        objective: "none" or "input_only".
      erase: "clipped" (`eta / max(1, eta |x|^2)`) or "implicit" (`eta / (1 + eta |x|^2)`).
      step: "gradient", or "normalised": U's learning rate is divided by |h|^2 + 0.01, so that it is
        the fraction of the error that one write corrects (normalised LMS).
      inner_clip: bound on the norm of each token's inner error, and of its gradient with respect to
        each matrix: a memory that has grown is written no faster; None for no bound.
      clip: what `inner_clip` bounds: "both", the "error" or the "gradient".
      decay_to: what a decay below 1 pulls the weights to: "zero", or their learned "start".
    """

    objective: Literal["l2", "dot", "delta"] = "l2"
    values: Literal["self", "shared"] = "self"
    targets: Literal["generated", "unit"] = "generated"
    written: Literal["both", "outer"] = "both"
    dgd: Literal["layerwise", "input_only", "output_only", "none", "functional"] = "layerwise"
    erase: Literal["clipped", "implicit"] = "clipped"
    step: Literal["gradient", "normalised"] = "gradient"
    inner_clip: Positive | None = 1.0
    clip: Literal["both", "error", "gradient"] = "both"
    decay_to: Literal["zero", "start"] = "zero"

    def __post_init__(self):
        check_fields(self)
        check_rule(self.rule(), linear=False, momentum=False)

    def rule(self, **others) -> Rule:
        """The rule of the kernels' package, with the choices that the memory itself makes."""
        return Rule(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **others)
