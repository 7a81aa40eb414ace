"""VAE of latent diffusion models, with settings that reduce memory."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acpo_dist.core.errors import ModelError, NonFiniteError
from acpo_dist.core.json_text import read_object
from acpo_dist.models.loading import CHECKPOINT_SUFFIXES, cast, load_part, looks_local
from acpo_dist.models.single_file import vae_folder

VAE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


class VaeDecoder:
    """Decodes scaled latents to images and encodes images to scaled latents."""

    def __init__(
        self, vae: AutoencoderKL, *, checkpointing: bool = False, slicing: bool = False, tiling: bool = False
    ) -> None:
        """Wrap a loaded VAE.

        Args:
            vae: the VAE; the encoder is needed for `encode` only.
            checkpointing: recompute the decoder's layers in the backward pass.
            slicing: decode samples one by one if no gradient is needed.
            tiling: decode in overlapping tiles if no gradient is needed. Images differ slightly, because normalisation
                is per tile.
        """
        self.vae: Any = vae
        self._slicing, self._tiling = slicing, tiling
        self._scale: float = vae.config.get("scaling_factor", 1.0)
        self._shift: float | None = vae.config.get("shift_factor")
        self._moments = _moments(vae)
        self._half = next(vae.decoder.parameters()).dtype == torch.float16
        if checkpointing:
            recompute_layers(self.vae.decoder)

    @property
    def channels(self) -> int:
        """Number of latent channels."""
        return int(self.vae.config["latent_channels"])

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def decode(self, clean: Tensor) -> Tensor:
        """Decode scaled latents to images.

        Args:
            clean: x_0 (scaled latents), shape (B, C, h, w).

        Returns:
            RGB around [0, 1], shape (B, 3, H, W), float32, not clipped, differentiable.

        Raises:
            NonFiniteError: the VAE runs in float16 and its activations overflow.
        """
        dtype = next(self.vae.decoder.parameters()).dtype
        latents = self.to_vae(clean)
        differentiated = torch.is_grad_enabled() and clean.requires_grad
        self.vae.use_slicing = self._slicing and not differentiated
        self.vae.use_tiling = self._tiling and not differentiated
        pixels = self.vae.decode(latents.to(dtype), return_dict=False)[0].float() / 2 + 0.5
        if self._half and bool(torch.isfinite(clean).all()) and not bool(torch.isfinite(pixels).all()):
            raise NonFiniteError(
                "the VAE's activations overflow in float16 (finite latents gave pixels that are not): set "
                "model.vae_dtype=float32 or bfloat16, or a VAE made for float16 (model.vae, such as "
                "madebyollin/sdxl-vae-fp16-fix)."
            )
        return pixels

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images to scaled latents: the mode of the posterior, without sampling.

        Args:
            pixels: RGB in [0, 1], shape (B, 3, H, W).

        Returns:
            x_0 (scaled latents), shape (B, C, h, w), float32, without gradients.

        Raises:
            NonFiniteError: the latents are not finite, for example because of an overflow in float16.
        """
        dtype = next(self.vae.encoder.parameters()).dtype
        latents = self.vae.encode((2 * pixels - 1).to(dtype)).latent_dist.mode().float()
        if not bool(torch.isfinite(latents).all()):
            raise NonFiniteError("the VAE's encoder gave latents that are not finite: set model.vae_dtype=float32.")
        return self.from_vae(latents)

    def to_vae(self, clean: Tensor) -> Tensor:
        """Convert x_0 to the latents that the VAE decodes."""
        latents = clean / self._scale
        if self._shift:
            latents = latents + self._shift
        if self._moments is not None:
            mean, std = (value.to(latents) for value in self._moments)
            latents = latents * std + mean
        return latents

    def from_vae(self, latents: Tensor) -> Tensor:
        """Convert latents of the VAE to x_0, the inverse of `to_vae`."""
        if self._moments is not None:
            mean, std = (value.to(latents) for value in self._moments)
            latents = (latents - mean) / std
        if self._shift:
            latents = latents - self._shift
        return latents * self._scale


def recompute_layers(decoder: nn.Module) -> None:
    """Recompute residual layers and upsamplers of a decoder in the backward pass; only their inputs are stored.

    The gradient checkpointing of diffusers recomputes whole blocks. The last block of SDXL's decoder (three residual
    layers at full resolution) then needs 10 GiB per image of 1024 px.
    """
    for module in decoder.modules():
        if isinstance(module, ResnetBlock2D | Upsample2D):
            module.forward = _recomputed(module.forward)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def load_vae(
    path: str,
    override: str | None,
    *,
    dtype: str,
    device: str,
    offline: bool,
    kind: Any = AutoencoderKL,
    family: str | None = None,
    **options: Any,
) -> Any:
    """Load the VAE of a pipeline, or the VAE that replaces it.

    Args:
        path: pipeline folder.
        override: value of `model.vae`: folder of a VAE, pipeline folder, hub id of either, or a single file; None
            loads the pipeline's VAE.
        dtype: a name in `VAE_DTYPES`.
        device: torch device.
        offline: use the local cache only.
        kind: class of the VAE.
        family: value of `model.type`, for a single file beside a pipeline without a VAE.
        options: revision and variant of the pipeline's files; not used for `override`.

    Returns:
        The frozen VAE.

    Raises:
        ModelError: the VAE cannot be loaded, or its configuration states that it overflows in float16.
    """
    if override is None:
        source, part, key = path, "vae", "model.path"
    else:
        source, part, options, key = str(Path(override).expanduser()), None, {}, "model.vae"
        if Path(source).is_file() and source.endswith(CHECKPOINT_SUFFIXES):
            own = Path(path, "vae", "config.json")
            source = str(vae_folder(Path(source), read_object(own) if own.is_file() else None, family))
        if looks_local(override) and not Path(source).is_dir():
            raise ModelError(f"model.vae: expected the folder of a VAE or a hub id, found nothing at `{override}`.")
        if (Path(source) / "vae").is_dir():
            part = "vae"
    vae = load_part(
        kind.from_pretrained, source, part, key=key, dtype=VAE_DTYPES[dtype], local_files_only=offline,
        **options,
    )  # fmt: skip
    if dtype == "float16" and vae.config.get("force_upcast", True):
        raise ModelError(
            f"model.vae_dtype is float16, but the VAE of `{source}` overflows in float16 (force_upcast in its "
            "configuration). Set model.vae_dtype=float32 or bfloat16, or model.vae to a VAE made for float16 "
            "(madebyollin/sdxl-vae-fp16-fix)."
        )
    return vae.requires_grad_(False).to(device).eval()


def _moments(vae: AutoencoderKL) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of the latents per channel, shape (1, C, 1, 1); None if not in the configuration."""
    mean, std = (vae.config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return None
    return torch.tensor(mean).reshape(1, -1, 1, 1), torch.tensor(std).reshape(1, -1, 1, 1)


def replace_vae(folder: Path, path: str, config: Any, *, kind: Any, dtype: torch.dtype) -> None:
    """Write the VAE that `model.vae` names into a pipeline folder, in place of the base model's own.

    Args:
        folder: pipeline folder to change.
        path: pipeline folder of the base model.
        config: the `model` section.
        kind: class of the VAE.
        dtype: data type of the written weights.
    """
    shutil.rmtree(folder / "vae")
    vae: Any = load_vae(path, config.vae, dtype="float32", device="cpu", offline=config.offline, kind=kind)
    cast(vae, dtype)
    vae.save_pretrained(folder / "vae", safe_serialization=True)
