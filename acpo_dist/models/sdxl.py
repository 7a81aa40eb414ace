"""Stable Diffusion XL: two text encoders, pooled and size conditioning, latent VAE."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from acpo_dist.config.section import Section
from acpo_dist.models.family import Condition
from acpo_dist.models.loading import DTYPES, DtypeName, held_dtype, load_part, resolve_path
from acpo_dist.models.tuning import TunedNetwork, TuningConfig


class VaeDecoder:
    """Scaled latents to pixels with SDXL's VAE."""

    def __init__(self, vae: AutoencoderKL) -> None:
        """Take a loaded VAE; its encoder may be absent."""
        self.vae = vae

    def decode(self, clean: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> RGB around [0, 1], float32, not clipped."""
        dtype = next(self.vae.decoder.parameters()).dtype
        latents = (clean / self.vae.config["scaling_factor"]).to(dtype)
        return self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5


class SdxlFamily:
    """SDXL's U-Net with what conditions and decodes it."""

    conditional: ClassVar[bool] = True
    pixel_space: ClassVar[bool] = False

    class Config(Section):
        """Which SDXL, and what trains."""

        type: Literal["sdxl"] = "sdxl"
        path: str = "stabilityai/stable-diffusion-xl-base-1.0"
        """Embedded toy (`toy-sdxl`), pipeline folder, or hub id."""
        revision: str | None = None
        variant: str | None = None
        """File variant, such as fp16."""
        image_size: int | None = None
        """Height and width in pixels; None takes the U-Net's own."""
        dtype: DtypeName = "float32"
        """Type of the frozen weights and of rollouts."""
        vae_dtype: DtypeName = "float32"
        """Type of the VAE; SDXL's overflows in float16, so only these two."""
        tuning: TuningConfig = TuningConfig()
        seed: int = 0
        """Seed of the adapters' initial values."""

    def __init__(self, config: Config, *, path: str, device: str, trainable: bool) -> None:
        """Load all parts; use `load`."""
        options: dict[str, Any] = {"revision": config.revision}
        weights = {**options, "variant": config.variant}
        self.config, self.path, self.device = config, path, device
        dtype = held_dtype(config.dtype, method=config.tuning.method, trainable=trainable)
        unet = load_part(UNet2DConditionModel.from_pretrained, path, "unet", torch_dtype=dtype, **weights)
        unet.to(device).eval()
        self._tuned = TunedNetwork(unet, config.tuning, seed=config.seed, keep_anchor=trainable)
        self.network: nn.Module = unet
        scheduler = load_part(DDPMScheduler.from_pretrained, path, "scheduler", **options)
        self.alpha_bars = scheduler.alphas_cumprod.double()
        self.prediction_type = str(scheduler.config["prediction_type"])
        self._tokenizers = [
            load_part(AutoTokenizer.from_pretrained, path, name, **options) for name in ("tokenizer", "tokenizer_2")
        ]
        self._encoders = [
            load_part(kind.from_pretrained, path, name, dtype=DTYPES[config.dtype], **weights).to(device).eval()
            for kind, name in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))
        ]
        for encoder in self._encoders:
            encoder.requires_grad_(False)
        index: Any = StableDiffusionXLPipeline.load_config(path, **options)
        self._zeros_for_empty = bool(index.get("force_zeros_for_empty_prompt", True))
        self._decoder = self.load_decoder(config, device=device)
        factor = 2 ** (len(self._decoder.vae.config["block_out_channels"]) - 1)
        pixels = config.image_size or unet.config["sample_size"] * factor
        self.sample_shape = (unet.config["in_channels"], pixels // factor, pixels // factor)
        self._time_ids = torch.tensor([pixels, pixels, 0, 0, pixels, pixels], dtype=DTYPES[config.dtype], device=device)
        self._cache: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def check(cls, config: Config) -> None:
        """See `ModelFamily.check`."""
        resolve_path(config.path)

    @classmethod
    def load(cls, config: Config, *, device: str, trainable: bool) -> "SdxlFamily":
        """See `ModelFamily.load`."""
        return cls(config, path=resolve_path(config.path), device=device, trainable=trainable)

    @classmethod
    def load_decoder(cls, config: Config, *, device: str) -> VaeDecoder:
        """The VAE alone."""
        path = resolve_path(config.path)
        vae = load_part(
            AutoencoderKL.from_pretrained, path, "vae", torch_dtype=DTYPES[config.vae_dtype],
            revision=config.revision, variant=config.variant,
        )  # fmt: skip
        vae.requires_grad_(False)
        return VaeDecoder(vae.to(device).eval())

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> tuple[Tensor, Tensor]:
        states, pooled = [], None
        for tokenizer, encoder in zip(self._tokenizers, self._encoders, strict=True):
            tokens = tokenizer(
                prompt,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            output = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            # SDXL reads the penultimate layer of both encoders, and the projection of the second.
            states.append(output.hidden_states[-2])
            pooled = output[0]
        assert pooled is not None
        joined = torch.cat(states, -1)
        if not prompt and self._zeros_for_empty:
            return torch.zeros_like(joined), torch.zeros_like(pooled)
        return joined, pooled

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Penultimate states (B, L, D), pooled projection (B, P) and size ids (B, 6); each prompt is encoded once."""
        for prompt in prompts:
            if prompt not in self._cache:
                self._cache[prompt] = self._encode_one(prompt)
        return Condition(
            {
                "prompt_embeds": torch.cat([self._cache[prompt][0] for prompt in prompts]),
                "pooled_prompt_embeds": torch.cat([self._cache[prompt][1] for prompt in prompts]),
                "time_ids": self._time_ids.expand(len(prompts), -1),
            }
        )

    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Condition) -> Tensor:
        """One U-Net pass; in and out float32 whatever the weights are."""
        tensors = condition.tensors
        added = {"text_embeds": tensors["pooled_prompt_embeds"], "time_ids": tensors["time_ids"]}
        # What the network holds now: DeepSpeed may have cast it.
        dtype = self._tuned.dtype
        output = self._tuned.active(
            noisy.to(dtype), timesteps_B, tensors["prompt_embeds"].to(dtype), added_cond_kwargs=added, return_dict=False
        )
        return output[0].float()

    def anchored(self) -> AbstractContextManager[None]:
        """See `ModelFamily.anchored`."""
        return self._tuned.anchored()

    def decode(self, clean: Tensor) -> Tensor:
        """See `Decoder.decode`."""
        return self._decoder.decode(clean)

    def save_pipeline(self, folder: Path) -> None:
        """Write the whole pipeline with the tuned U-Net merged, and the adapter alone in diffusers' LoRA layout."""
        pipeline = load_part(
            StableDiffusionXLPipeline.from_pretrained, self.path, None, unet=self._tuned.merged(),
            revision=self.config.revision, variant=self.config.variant, torch_dtype=torch.float32,
        )  # fmt: skip
        # One type throughout: transformers opens an encoder in the type it was saved in, diffusers the rest in float32.
        pipeline.save_pretrained(folder, safe_serialization=True)
        layers = self._tuned.adapter_state()
        if layers:
            StableDiffusionXLPipeline.save_lora_weights(
                folder / "lora", unet_lora_layers=dict(layers), safe_serialization=True
            )
