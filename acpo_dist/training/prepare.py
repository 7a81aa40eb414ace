"""Train the base model (`model.path: train`) and metric weights (`weights: train`) of a run on its real images."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import ConfigError
from acpo_dist.core.processor import computes_bfloat16
from acpo_dist.core.seeding import derive_seed
from acpo_dist.data.images import ImageSet, load_images
from acpo_dist.data.toy.damage import BASE_DAMAGE, JUDGE_DAMAGE, Damage
from acpo_dist.models.training.denoiser import train_denoiser
from acpo_dist.models.training.toy_models import new_ddpm, save_ddpm
from acpo_dist.rewards.strided_judge import StridedJudge
from acpo_dist.rewards.training.damaged import damaged_windows, native_images
from acpo_dist.rewards.training.iqa import train_iqa
from acpo_dist.rewards.two_stream import TOY, TwoStream
from acpo_dist.tracking.console import Console

logger = logging.getLogger(__name__)

TRAIN = "train"
_HELD_OUT = 0.1
_KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Damage]]] = {
    "two_stream": (lambda: TwoStream(TOY), BASE_DAMAGE),
    "strided_judge": (StridedJudge, JUDGE_DAMAGE),
}


def prepare(config: Config, root: Path, console: Console) -> Config:
    """Train every part set to `train` into `root` unless it is there; return the configuration with the paths.

    Raises:
        ConfigError: a part is to be trained, but `data.path` is unset.
    """
    wanted = [
        entry for entry in (*config.rewards.train, *config.rewards.judges) if getattr(entry, "weights", None) == TRAIN
    ]
    train_model = getattr(config.model, "path", None) == TRAIN
    if not wanted and not train_model:
        return config
    if config.data.path is None:
        named = [*(entry.name for entry in wanted), *(["model.path"] if train_model else [])]
        raise ConfigError(f"{', '.join(named)}: `{TRAIN}` needs real images; set data.path (folder, parquet or zip).")
    data = config.data
    root.mkdir(parents=True, exist_ok=True)
    model = config.model
    if train_model:
        images = load_images(config.data.path, data.image_column, data.max_images, model.base.image_size)
        model = model.model_copy(update={"path": str(_train_base(model, images, root / "ddpm", console))})
    missing = [entry for entry in wanted if not _weights_of(entry, root).is_file()]
    if missing:
        native = native_images(config.data.path, data.image_column, data.max_images)
        if len(native) < 2:
            raise ConfigError(f"data.path: {config.data.path} holds {len(native)} images; training a metric needs two.")
        for entry in missing:
            _train_metric(entry, native, _weights_of(entry, root), console)
    rewards = config.rewards.model_copy(
        update={
            role: tuple(
                entry.model_copy(update={"weights": str(_weights_of(entry, root))}) if entry in wanted else entry
                for entry in getattr(config.rewards, role)
            )
            for role in ("train", "judges")
        }
    )
    return config.model_copy(update={"model": model, "rewards": rewards})


def _train_base(model: Any, images: ImageSet, folder: Path, console: Console) -> Path:
    if (folder / "model_index.json").is_file():
        console.message(f"base model: {folder} (made before)")
        return folder

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, object]:
        rows = torch.randint(len(images), (count,), generator=generator)
        flip = torch.rand(count, generator=generator)[:, None, None, None] < 0.5
        batch = images.batch(rows)
        return 2 * torch.where(flip, batch.flip(-1), batch) - 1, None

    def predict(network: nn.Module, noisy: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        return network(noisy, timesteps).sample

    seed = derive_seed("base", model.seed) % 2**31
    torch.manual_seed(seed)
    base = model.base
    unet = new_ddpm(base.image_size, base.channels)
    limit = f", {base.max_seconds:.0f} s at most" if base.max_seconds else ""
    dtype = base.dtype
    if dtype == "auto":
        dtype = "bfloat16" if computes_bfloat16("cpu") else "float32"
    console.message(f"no base model given: training one on {len(images)} images, {base.steps} steps in {dtype}{limit}")
    with console.phase("base model", base.steps) as advance:
        loss = train_denoiser(
            unet, draw, predict, DDPMScheduler(num_train_timesteps=1000).alphas_cumprod, steps=base.steps,
            batch_size=base.batch_size, seed=seed, learning_rate=base.learning_rate, max_seconds=base.max_seconds,
            prediction_type=base.prediction_type, timestep_sampling=base.timestep_sampling,
            dtype=getattr(torch, dtype), progress=lambda step, steps, loss: advance(1),
        )  # fmt: skip
    save_ddpm(folder, unet, half=False, prediction_type=base.prediction_type)
    console.message(f"base model trained on {len(images)} images: {base.prediction_type} error {loss:.4f}; {folder}")
    return folder


def _weights_of(entry: Any, root: Path) -> Path:
    return root / f"{entry.name}.safetensors"


def _train_metric(entry: Any, images: Sequence[Tensor], path: Path, console: Console) -> None:
    build, family = _KINDS[entry.type]
    seed = derive_seed("iqa", entry.name) % 2**31
    torch.manual_seed(seed)
    network = build()
    console.message(f"training metric {entry.name} on damaged images, {entry.train_steps} steps")
    held_out = max(1, int(len(images) * _HELD_OUT))
    with console.phase(f"metric {entry.name}", None):
        report = train_iqa(
            network, damaged_windows(images, family, held_out, len(images)), steps=entry.train_steps, batch_size=64,
            seed=seed, held_out=damaged_windows(images, family, 0, held_out),
        )  # fmt: skip
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    console.message(f"metric {entry.name}: SRCC {report.srcc:.3f} on damaged held-out images; {path}")
