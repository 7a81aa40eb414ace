"""The noise levels that a pipeline folder was trained on."""

from diffusers import DDPMScheduler
from torch import Tensor

from acpo_dist.core.errors import ModelError
from acpo_dist.models.loading import load_part

NEAR_ZERO = 2.0**-24
"""What stands for a cumulative signal of zero, as in diffusers' Euler scheduler: the first noise level stays finite."""


def read_schedule(path: str, revision: str | None = None) -> tuple[str, Tensor]:
    """Prediction type, and cumulative signal fraction by timestep (T,) in float64, of a pipeline folder.

    A schedule with zero terminal SNR ends at 2^-24 instead of 0.

    Raises:
        ModelError: unreadable, no discrete noise schedule, or one that its prediction type cannot serve.
    """
    config = load_part(DDPMScheduler.load_config, path, "scheduler", revision=revision)
    kind = str(config.get("_class_name"))
    if kind.startswith(("EDM", "Flow")):
        raise ModelError(
            f"model.path: `{path}` is trained for {kind}, whose noise levels are not those of a discrete "
            "Stable Diffusion schedule; such models cannot be tuned here."
        )
    scheduler = load_part(DDPMScheduler.from_pretrained, path, "scheduler", revision=revision)
    prediction_type = str(scheduler.config["prediction_type"])
    alpha_bars = scheduler.alphas_cumprod.double()
    if float(alpha_bars[-1]) < NEAR_ZERO:
        if prediction_type == "epsilon":
            raise ModelError(
                f"model.path: the schedule of `{path}` ends without signal (rescale_betas_zero_snr), where a noise "
                "prediction says nothing of the image: such a model must predict v. Check its scheduler_config.json."
            )
        alpha_bars[-1] = NEAR_ZERO
    return prediction_type, alpha_bars
