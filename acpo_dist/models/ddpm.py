"""Unconditional DDPM in pixel space."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from acpo_dist.models.config import DdpmConfig
from acpo_dist.models.family import Condition
from acpo_dist.models.loading import held_dtype, load_part, resolve_path
from acpo_dist.models.noise_levels import read_schedule
from acpo_dist.models.tuning import TunedNetwork


class PixelDecoder:
    """x_0 in [-1, 1] to pixels in [0, 1]."""

    def decode(self, clean: Tensor) -> Tensor:
        """Half plus half, not clipped."""
        return clean.float() / 2 + 0.5


class DdpmFamily:
    """A `DDPMPipeline` folder with a `UNet2DModel`."""

    conditional: ClassVar[bool] = DdpmConfig.conditional
    pixel_space: ClassVar[bool] = DdpmConfig.pixel_space

    Config = DdpmConfig

    def __init__(self, config: DdpmConfig, *, path: str, device: str, trainable: bool) -> None:
        """Load all parts; use `load`."""
        self.config, self.path, self.device = config, path, device
        # Older DDPM folders keep the U-Net's files at the top.
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
        size = unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        self.sample_shape = (unet.config["in_channels"], height, width)
        self.pixels = height
        self.decoder = PixelDecoder()

    @classmethod
    def check(cls, config: DdpmConfig) -> None:
        """See `ModelFamily.check`."""
        if config.path != "train":
            resolve_path(config.path)

    @classmethod
    def load(cls, config: DdpmConfig, *, device: str, trainable: bool) -> "DdpmFamily":
        """See `ModelFamily.load`."""
        path = resolve_path(config.path)
        if not Path(path).is_dir():
            # A hub id. Its layout shows once it is here.
            path = str(load_part(DDPMPipeline.download, path, None, revision=config.revision))
        return cls(config, path=path, device=device, trainable=trainable)

    @classmethod
    def load_decoder(cls, config: DdpmConfig, *, device: str) -> PixelDecoder:
        """Pixels need no network."""
        return PixelDecoder()

    def encode(self, prompts: Sequence[str]) -> Condition:
        """No condition; prompts are ignored."""
        return Condition({})

    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Condition) -> Tensor:
        """One U-Net pass; in and out float32 whatever the weights are."""
        return self._tuned.active(noisy.to(self._tuned.dtype), timesteps_B, return_dict=False)[0].float()

    def anchored(self) -> AbstractContextManager[None]:
        """See `ModelFamily.anchored`."""
        return self._tuned.anchored()

    def substituted(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """See `ModelFamily.substituted`."""
        return self._tuned.substituted(weights)

    def decode(self, clean: Tensor) -> Tensor:
        """See `Decoder.decode`."""
        return self.decoder.decode(clean)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """See `ModelFamily.encode_images`."""
        return 2 * pixels.float() - 1

    def save_pipeline(self, folder: Path) -> None:
        """Write a `DDPMPipeline` with the tuned U-Net."""
        subfolder = "scheduler" if (Path(self.path) / "scheduler").is_dir() else None
        scheduler = load_part(DDPMScheduler.from_pretrained, self.path, subfolder)
        unet = self._tuned.merged().to(torch.float32)
        assert isinstance(unet, UNet2DModel)
        DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
