"""From a preset's name or a configuration to a model."""

from flax import nnx

from nestedjax.models.config import ModelConfig
from nestedjax.models.in_context import InContextModel
from nestedjax.models.language_model import LanguageModel
from nestedjax.models.presets import PRESETS
from pallas_kernels import check_width

Model = LanguageModel | InContextModel


def build(preset: str | ModelConfig, *, rngs: nnx.Rngs) -> Model:
    """Build a model.

    Args:
      preset: a name in `PRESETS`, or a model configuration.
      rngs: where the weights are drawn.

    Returns:
      The model; abstract (nothing allocated) under `nnx.eval_shape`. An `InContextModel` where the
      continuum memory's lifetime is "in_context".

    Raises:
      ValueError: if there is no such preset, it is no model configuration, or its dtype is float64
        and jax_enable_x64 is off.

    Example:
      >>> from flax import nnx
      >>> from nestedjax import models
      >>> model = nnx.eval_shape(lambda: models.build("hope_1p3b", rngs=nnx.Rngs(0)))
      >>> f"{models.parameter_count(model):,}"
      '1,323,727,904'
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"no preset {preset!r}; there are {', '.join(sorted(PRESETS))}")
        preset = PRESETS[preset]
    if not isinstance(preset, ModelConfig):
        raise ValueError(
            f"cannot build a {type(preset).__name__}; use a preset's name or a ModelConfig"
        )
    check_width(f"{type(preset).__name__}: dtype is", preset.dtype)
    model = LanguageModel(preset, rngs=rngs)
    cms = preset.continuum
    if cms is not None and cms.lifetime == "in_context":
        return InContextModel(model, cms)
    return model
