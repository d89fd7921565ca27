"""From a preset's name or a configuration to a model."""

from typing import Any

from flax import nnx

from nestedjax.models.config import HopeAttentionConfig, HopeConfig, TransformerConfig
from nestedjax.models.hope import HopeBlock
from nestedjax.models.hope_attention import HopeAttentionBlock
from nestedjax.models.in_context import InContextModel
from nestedjax.models.language_model import LanguageModel
from nestedjax.models.presets import PRESETS
from nestedjax.models.transformer import TransformerBlock

Model = LanguageModel | InContextModel
BLOCKS = {
    TransformerConfig: TransformerBlock,
    HopeConfig: HopeBlock,
    HopeAttentionConfig: HopeAttentionBlock,
}


def build(preset: Any, *, rngs: nnx.Rngs) -> Model:
    """Build a model.

    Args:
      preset: a name in `PRESETS`, or a model configuration.
      rngs: where the weights are drawn.

    Returns:
      The model; abstract (nothing allocated) under `nnx.eval_shape`. An `InContextModel` where the
      continuum memory's lifetime is "in_context".

    Raises:
      ValueError: if there is no such preset, or no such kind of configuration.

    Example:
      >>> from flax import nnx
      >>> from nestedjax import models
      >>> model = nnx.eval_shape(lambda: models.build("hope_1p3b", rngs=nnx.Rngs(0)))
      >>> f"{models.parameter_count(model):,}"
      '1,324,042,944'
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"No preset {preset!r}; there are {', '.join(sorted(PRESETS))}.")
        preset = PRESETS[preset]
    block = BLOCKS.get(type(preset))
    if block is None:
        known = ", ".join(config.__name__ for config in BLOCKS)
        raise ValueError(f"Cannot build {type(preset).__name__}; use a preset's name or {known}.")
    model = LanguageModel(preset, lambda streams: block(preset, rngs=streams), rngs=rngs)
    cms = getattr(preset, "cms", None)
    if cms is not None and cms.lifetime == "in_context":
        return InContextModel(model, cms)
    return model
