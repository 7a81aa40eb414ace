"""Unconditional DDPM in pixel space."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from acpo_dist.core.errors import ModelError
from acpo_dist.core.sizes import Size
from acpo_dist.models.config import DdpmConfig
from acpo_dist.models.family import Condition
from acpo_dist.models.loading import cast, held_dtype, load_part, resolve_path
from acpo_dist.models.noise_levels import read_schedule
from acpo_dist.models.tuning import TunedNetwork


class PixelDecoder:
    """Converts x_0 in [-1, 1] to pixels in [0, 1]."""

    def decode(self, clean: Tensor) -> Tensor:
        """Convert x_0 to pixels, x_0 / 2 + 0.5, without clipping.

        Args:
            clean: x_0, shape (B, C, H, W).

        Returns:
            RGB around [0, 1], float32, same shape.
        """
        return clean.float() / 2 + 0.5


class DdpmFamily:
    """An unconditional DDPM: a `DDPMPipeline` folder with a `UNet2DModel`."""

    conditional: ClassVar[bool] = DdpmConfig.conditional
    pixel_space: ClassVar[bool] = DdpmConfig.pixel_space

    Config = DdpmConfig

    def __init__(self, config: DdpmConfig, *, path: str, device: str, trainable: bool) -> None:
        """Load all components. Called by `load`.

        Args:
            config: the `model` section.
            path: pipeline folder.
            device: torch device.
            trainable: whether the weights are trained (learner) or only sampled from (rollout).
        """
        self.config, self.path, self.device = config, path, device
        # Older DDPM folders have the U-Net's files at the top level.
        subfolder = "unet" if (Path(path) / "unet").is_dir() else None
        unet = load_part(
            UNet2DModel.from_pretrained,
            path,
            subfolder,
            dtype=held_dtype(config.dtype, method=config.tuning.method, trainable=trainable),
            revision=config.revision,
        )
        unet.to(device).eval()
        self._tuned = TunedNetwork(unet, config.tuning, seed=config.seed, keep_anchor=trainable)
        self.network: nn.Module = unet
        self.schedule = read_schedule(path, config.revision, "scheduler" if subfolder else None)
        self.prediction_type, self.alpha_bars = self.schedule.prediction_type, self.schedule.alpha_bars
        self.clean_rule = self.schedule.rule
        if self.prediction_type == "flow_prediction":
            raise ModelError(
                f"model.path: `{path}` is a flow model in pixel space ({self.schedule.scheduler}), which has no family "
                "here; flow models are supported on latents (model.type sdxl)."
            )
        size = unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        self.sample_shape = (unet.config["in_channels"], height, width)
        self.size = (width, height)
        self.decoder = PixelDecoder()

    @classmethod
    def check(cls, config: DdpmConfig) -> None:
        """Check that the path can be resolved, without loading.

        Raises:
            ModelError: the path is not a pipeline folder, an embedded toy or a hub id.
        """
        if config.path != "train":
            resolve_path(config.path)

    @classmethod
    def load(cls, config: DdpmConfig, *, device: str, trainable: bool) -> "DdpmFamily":
        """Load the model from the configured path; a hub id is downloaded first.

        Raises:
            ModelError: the model is missing or cannot be read.
        """
        path = resolve_path(config.path)
        if not Path(path).is_dir():
            # A hub id: the folder layout is known only after the download.
            path = str(load_part(DDPMPipeline.download, path, None, revision=config.revision))
        return cls(config, path=path, device=device, trainable=trainable)

    @classmethod
    def load_decoder(cls, config: DdpmConfig, *, device: str) -> PixelDecoder:
        """Return the decoder; it has no weights."""
        return PixelDecoder()

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Return an empty condition; prompts are ignored."""
        return Condition({})

    def sized(self, condition: Condition, noisy: Tensor) -> Condition:
        """Return the empty condition."""
        return condition

    def shape_of(self, size: Size | None) -> tuple[int, int, int]:
        """Return (C, H, W) of x_0 for images of a size (width, height); None is the model's own."""
        width, height = size or self.size
        return self.sample_shape[0], height, width

    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Condition) -> Tensor:
        """Run the U-Net once.

        Args:
            noisy: x_t, shape (B, C, H, W), float32.
            timesteps_B: timestep per sample.
            condition: ignored.

        Returns:
            Network output of the same shape, float32 for any data type of the weights.
        """
        return self._tuned.active(noisy.to(self._tuned.dtype), timesteps_B, return_dict=False)[0].float()

    def anchored(self) -> AbstractContextManager[None]:
        """Context in which `predict` runs the frozen base model."""
        return self._tuned.anchored()

    def substituted(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Context in which `predict` uses the given values of the trainable weights, without gradients."""
        return self._tuned.substituted(weights)

    def decode(self, clean: Tensor) -> Tensor:
        """Convert x_0 to RGB around [0, 1], float32, without clipping."""
        return self.decoder.decode(clean)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Convert RGB in [0, 1] to x_0 in [-1, 1], float32."""
        return 2 * pixels.float() - 1

    def release(self) -> None:
        """Do nothing: nothing is kept in host memory."""

    def save_pipeline(self, folder: Path) -> None:
        """Write a `DDPMPipeline` with the tuned U-Net."""
        subfolder = "scheduler" if (Path(self.path) / "scheduler").is_dir() else None
        scheduler = load_part(DDPMScheduler.from_pretrained, self.path, subfolder)
        unet = self._tuned.merged()
        assert isinstance(unet, UNet2DModel)
        cast(unet, torch.float32)
        DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
