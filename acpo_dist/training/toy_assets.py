"""Rebuild every asset of the toy world from seeds: reward, judge, VAE, toy-sdxl, toy-ddpm, toy-sd15, toy-flow."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from acpo_dist.data.toy.damage import BASE_DAMAGE, JUDGE_DAMAGE, Damage, spoil
from acpo_dist.data.toy.text import MAX_TOKENS, write_tokenizer
from acpo_dist.data.toy.world import IMAGE_SIZE, caption_index, captions, templates
from acpo_dist.diffusion.flow import flow_alpha_bars, flow_inputs
from acpo_dist.models.training.denoiser import ExampleBatch, Progress, train_denoiser
from acpo_dist.models.training.toy_models import (
    ToyFlow,
    ToySd15,
    ToySdxl,
    new_ddpm,
    new_vae,
    save_ddpm,
    save_toy_flow,
    save_toy_sd15,
    save_toy_sdxl,
    sd15_scheduler,
    sdxl_scheduler,
)
from acpo_dist.models.training.vae import train_vae
from acpo_dist.rewards.strided_judge import StridedJudge
from acpo_dist.rewards.training.iqa import train_iqa
from acpo_dist.rewards.two_stream import TOY, TwoStream

logger = logging.getLogger(__name__)

SEEDS = {"reward": 11, "judge": 23, "vae": 37, "sdxl": 41, "ddpm": 53, "sd15": 67, "flow": 71}
PARTS = tuple(SEEDS)
NULL_SHARE = 0.10
_LATENT_BANK = 34_560
_FLOW_BANK = 8_640
_WEB_EXPONENT = 0.5
"""The latent model learns from mostly poor images, so that its quality can be raised."""


def build(part: str, folder: Path, *, effort: float = 1.0, progress: Progress | None = None) -> None:
    """Train one part and write it below `folder`.

    Args:
        part: one of `PARTS`; `sdxl`, `sd15` and `flow` need `vae` to be there.
        effort: scales the number of training steps; 1 gives the shipped assets.

    Raises:
        ValueError: unknown part.
        FileNotFoundError: `sdxl`, `sd15` or `flow` before `vae`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    builders = {"reward": _build_reward, "judge": _build_judge, "vae": _build_vae}
    if part in builders:
        builders[part](folder, effort)
    elif part in _DENOISERS:
        _DENOISERS[part](folder, effort, progress)
    else:
        raise ValueError(f"unknown part {part!r}; known: {', '.join(PARTS)}")


def draw_spoiled(
    family: dict[str, Damage], count: int, generator: torch.Generator, *, severity_exponent: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random scenes with random damage: (images, severities, caption ids)."""
    ids = torch.randint(len(templates()), (count,), generator=generator)
    images, severity = spoil(templates()[ids], family, generator, severity_exponent=severity_exponent)
    return images, severity, caption_index()[ids]


def _labelled(family: dict[str, Damage]):
    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images, severity, _ = draw_spoiled(family, count, generator)
        return images, severity

    return draw


def _build_reward(folder: Path, effort: float) -> None:
    torch.manual_seed(SEEDS["reward"])
    network = TwoStream(TOY)
    report = train_iqa(network, _labelled(BASE_DAMAGE), steps=int(1500 * effort), batch_size=64, seed=SEEDS["reward"])
    _save_network(folder / "two_stream", network, asdict(report))


def _build_judge(folder: Path, effort: float) -> None:
    torch.manual_seed(SEEDS["judge"])
    network = StridedJudge()
    report = train_iqa(network, _labelled(JUDGE_DAMAGE), steps=int(2500 * effort), batch_size=64, seed=SEEDS["judge"])
    _save_network(folder / "judge", network, asdict(report))


def _save_network(stem: Path, network: nn.Module, report: dict[str, float]) -> None:
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, f"{stem}.safetensors")
    Path(f"{stem}.json").write_text(json.dumps(report, indent=2) + "\n")
    logger.info("%s: %s", stem.name, report)


def _build_vae(folder: Path, effort: float) -> None:
    torch.manual_seed(SEEDS["vae"])
    vae = new_vae()

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return draw_spoiled(BASE_DAMAGE, count, generator)[0]

    train_vae(vae, draw, steps=int(4000 * effort), batch_size=32, seed=SEEDS["vae"])
    half: Any = vae.to(torch.float16)  # pyright: ignore[reportArgumentType]
    half.save_pretrained(folder / "toy-sdxl" / "vae", safe_serialization=True)


@torch.no_grad()
def _latent_bank(vae: AutoencoderKL, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images, _, caption_ids = draw_spoiled(BASE_DAMAGE, count, generator, severity_exponent=_WEB_EXPONENT)
    scale = vae.config["scaling_factor"]
    encode: Any = vae.encode
    latents = torch.cat([scale * encode(2 * chunk - 1).latent_dist.mean for chunk in images.split(64)])
    return latents, caption_ids


def _load_vae(folder: Path, part: str) -> AutoencoderKL:
    """Return the VAE that the toy models share; it is stored in toy-sdxl."""
    vae_folder = folder / "toy-sdxl" / "vae"
    if not vae_folder.is_dir():
        raise FileNotFoundError(f"toy-{part} needs its VAE in {vae_folder}; build the part `vae` first")
    return AutoencoderKL.from_pretrained(vae_folder, dtype=torch.float32).eval()


def _token_ids(folder: Path, texts: Sequence[str]) -> Tensor:
    scratch = folder / "_tokenizer"
    write_tokenizer(scratch)
    tokenizer = CLIPTokenizer.from_pretrained(scratch)
    shutil.rmtree(scratch)
    return tokenizer(list(texts), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


def captioned_latents(vae: AutoencoderKL, seed: int, count: int = _LATENT_BANK) -> ExampleBatch:
    """Return random latents with (caption id, 1 to keep the caption or 0 to drop it)."""
    latents, caption_ids = _latent_bank(vae, count, torch.Generator().manual_seed(seed))

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, object]:
        rows = torch.randint(len(latents), (count,), generator=generator)
        keep = (torch.rand(count, generator=generator) >= NULL_SHARE).float()
        return latents[rows], (caption_ids[rows], keep)

    return draw


def _build_sdxl(folder: Path, effort: float, progress: Progress | None) -> None:
    vae = _load_vae(folder, "sdxl")
    torch.manual_seed(SEEDS["sdxl"])
    model = ToySdxl()
    tokens = _token_ids(folder, captions())
    time_ids = torch.tensor([IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]).float()

    def predict(network: nn.Module, noisy: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        assert isinstance(network, ToySdxl) and isinstance(condition, tuple)
        ids, keep = condition
        states, pooled = network.encode(tokens)
        added = {"text_embeds": pooled[ids] * keep[:, None], "time_ids": time_ids.expand(len(ids), -1)}
        return network.unet(noisy, timesteps, states[ids] * keep[:, None, None], added_cond_kwargs=added).sample

    loss = train_denoiser(
        model, captioned_latents(vae, SEEDS["sdxl"]), predict, sdxl_scheduler().alphas_cumprod,
        steps=int(9_000 * effort), batch_size=64, seed=SEEDS["sdxl"], progress=progress,
    )  # fmt: skip
    logger.info("toy-sdxl: noise-prediction error %.4f", loss)
    save_toy_sdxl(folder / "toy-sdxl", model, vae)


def _build_sd15(folder: Path, effort: float, progress: Progress | None) -> None:
    vae = _load_vae(folder, "sd15")
    torch.manual_seed(SEEDS["sd15"])
    model = ToySd15()
    # SD 1.5's null condition is the encoded empty prompt, not zeros.
    tokens, null = _token_ids(folder, [*captions(), ""]), len(captions())

    def predict(network: nn.Module, noisy: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        assert isinstance(network, ToySd15) and isinstance(condition, tuple)
        ids, keep = condition
        states = network.encode(tokens)[torch.where(keep > 0, ids, null)]
        return network.unet(noisy, timesteps, states).sample

    loss = train_denoiser(
        model, captioned_latents(vae, SEEDS["sd15"]), predict, sd15_scheduler().alphas_cumprod,
        steps=int(3_500 * effort), batch_size=64, seed=SEEDS["sd15"], progress=progress,
    )  # fmt: skip
    logger.info("toy-sd15: noise-prediction error %.4f", loss)
    save_toy_sd15(folder / "toy-sd15", model, vae)


def _build_flow(folder: Path, effort: float, progress: Progress | None) -> None:
    vae = _load_vae(folder, "flow")
    torch.manual_seed(SEEDS["flow"])
    model = ToyFlow()
    tokens, null = _token_ids(folder, [*captions(), ""]), len(captions())
    captioned = captioned_latents(vae, SEEDS["flow"], _FLOW_BANK)
    # SD3's VAE centres its latents.
    scale = vae.config["scaling_factor"]
    shift = round(float(captioned(4096, torch.Generator().manual_seed(SEEDS["flow"]))[0].mean()) / scale, 4)

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, object]:
        latents, condition = captioned(count, generator)
        return latents - shift * scale, condition

    def predict(network: nn.Module, noisy: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        assert isinstance(network, ToyFlow) and isinstance(condition, tuple)
        ids, keep = condition
        states, pooled = network.encode(tokens)
        rows = torch.where(keep > 0, ids, null)
        state, at = flow_inputs(noisy, timesteps, len(levels))
        return network.transformer(state, states[rows], pooled[rows], at.float()).sample

    levels = flow_alpha_bars(1000)

    loss = train_denoiser(
        model, draw, predict, levels, steps=int(4_000 * effort), batch_size=64, seed=SEEDS["flow"],
        learning_rate=2e-3, prediction_type="flow_prediction", timestep_sampling="logit_normal", progress=progress,
    )  # fmt: skip
    logger.info("toy-flow: velocity error %.4f", loss)
    save_toy_flow(folder / "toy-flow", model, vae, shift_factor=shift)


def _build_ddpm(folder: Path, effort: float, progress: Progress | None) -> None:
    torch.manual_seed(SEEDS["ddpm"])
    unet = new_ddpm()

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, object]:
        return 2 * draw_spoiled(BASE_DAMAGE, count, generator)[0] - 1, None

    def predict(network: nn.Module, noisy: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        return network(noisy, timesteps).sample

    loss = train_denoiser(
        unet, draw, predict, DDPMScheduler(num_train_timesteps=1000).alphas_cumprod, steps=int(8_000 * effort),
        batch_size=32, seed=SEEDS["ddpm"], progress=progress,
    )  # fmt: skip
    logger.info("toy-ddpm: noise-prediction error %.4f", loss)
    save_ddpm(folder / "toy-ddpm", unet, half=True)


_DENOISERS = {"sdxl": _build_sdxl, "ddpm": _build_ddpm, "sd15": _build_sd15, "flow": _build_flow}
