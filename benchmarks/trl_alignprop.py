"""trl's AlignPropTrainer on the toy SD 1.5, as a competitor: the same model, reward, prompts and sampler as `toy_sd15`.

trl 0.23 is the last version with this trainer, and needs an environment of its own:

    uv venv trl
    uv pip install --python trl/bin/python trl==0.23.0 diffusers==0.35.1 transformers==4.57.1 'peft<0.18' torch
    uv pip install --python trl/bin/python pydantic pyyaml scipy pillow
    PYTHONPATH=. trl/bin/python benchmarks/trl_alignprop.py train --updates 0 10 20 --out FOLDER [--seed 0]
    .venv/bin/python benchmarks/trl_alignprop.py judge FOLDER/*.npz

`train` (0 updates is the base model) counts the CPU seconds of the updates (user and system), draws evaluation images
with the plain pipeline, and measures the drift of the noise prediction as `evaluation/metrics/arm.py` does. `judge`
scores the images with the reward, the judge and the oracle of the project.
"""

import os

# Before torch is imported: two torch threads on contended cores are tens of times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import importlib
import random
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acpo_dist.data.toy.world import captions

STEPS, GUIDANCE, BATCH, RATE = 12, 1.5, 32, 4e-3
DRIFT_TIMESTEPS = (20, 100, 200, 300, 600, 900)
MODEL = Path(__file__).parents[1] / "acpo_dist/data/toy/assets/toy-sd15"


def main() -> None:
    """Train or judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("--updates", type=int, nargs="+", default=[0, 10, 20])
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--samples", type=int, default=192)
    training.add_argument("--out", type=Path, required=True)
    commands.add_parser("judge").add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    if options.command == "train":
        train(options)
    else:
        judge(options.files)


def cpu_seconds() -> float:
    """User and system seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def train(options: argparse.Namespace) -> None:
    """Run the trainer and write images and drift after the given numbers of updates."""
    # Not an import statement: the project's own environment has no trl.
    trl = importlib.import_module("trl")
    importlib.import_module("accelerate").PartialState(cpu=True)
    from acpo_dist.rewards.config import TwoStreamConfig
    from acpo_dist.rewards.metrics import TwoStreamMetric

    options.out.mkdir(parents=True, exist_ok=True)
    metric = TwoStreamMetric(TwoStreamConfig(type="two_stream"))
    pipeline = trl.DefaultDDPOStableDiffusionPipeline(str(MODEL), use_lora=True)
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)
    config = trl.AlignPropConfig(
        seed=options.seed, mixed_precision="no", sample_num_steps=STEPS, sample_eta=0.0,
        sample_guidance_scale=GUIDANCE, train_batch_size=BATCH, train_learning_rate=RATE,
        # The range is in sampler steps; the default of 50 would detach nearly all of 12.
        truncated_rand_backprop_minmax=(0, STEPS), save_freq=10**6,
        project_kwargs={"project_dir": str(options.out / "trainer")},
    )  # fmt: skip
    prompts, stream = captions(), random.Random(options.seed)

    def reward(images: torch.Tensor, prompts: list[str], _metadata: Any) -> tuple[torch.Tensor, dict]:
        # "pt" images of this pipeline are in [0, 1].
        return metric(images.clamp(0, 1), prompts), {}

    trainer = trl.AlignPropTrainer(config, reward, lambda: (stream.choice(prompts), {}), pipeline)
    spent = 0.0
    for update in range(max(options.updates) + 1):
        if update > 0:
            started = cpu_seconds()
            trainer.step(0, update)
            spent += cpu_seconds() - started
        if update in options.updates:
            images, drift, used = evaluate(pipeline.sd_pipeline, options.samples)
            path = options.out / f"alignprop-{options.seed}-{update}.npz"
            np.savez_compressed(path, images=images.numpy(), prompts=np.array(used), drift=drift, cpu_seconds=spent)
            sys.stdout.write(f"{path}: {spent:.1f} CPU s\n")
            sys.stdout.flush()


@torch.no_grad()
def evaluate(pipe: Any, count: int) -> tuple[torch.Tensor, float, list[str]]:
    """Return images uint8 (B, 3, H, W), rms drift of the noise prediction, and prompts."""
    pipe.unet.eval()
    every, size = captions(), pipe.unet.config.sample_size
    prompts = [every[index % len(every)] for index in range(count)]
    generator = torch.Generator().manual_seed(1234)
    latents, images = [], []
    for start in range(0, count, 64):
        part = prompts[start : start + 64]
        noise = torch.randn(len(part), 4, size, size, generator=generator)
        clean = pipe(
            prompt=part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent", latents=noise
        ).images
        pixels = pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample / 2 + 0.5
        latents.append(clean)
        images.append((pixels.clamp(0, 1) * 255).round().to(torch.uint8))
    clean = torch.cat(latents)[:96]
    states = pipe.encode_prompt(prompts[: len(clean)], "cpu", 1, False)[0]
    squares = []
    for timestep in DRIFT_TIMESTEPS:
        level = pipe.scheduler.alphas_cumprod[timestep]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(timestep))
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        tuned = pipe.unet(noisy, timestep, encoder_hidden_states=states).sample
        pipe.unet.disable_adapters()
        base = pipe.unet(noisy, timestep, encoder_hidden_states=states).sample
        pipe.unet.enable_adapters()
        squares.append(float((tuned - base).square().mean()))
    return torch.cat(images), (sum(squares) / len(squares)) ** 0.5, prompts


def judge(files: list[Path]) -> None:
    """Print the project's metrics of saved images."""
    from acpo_dist.config.load import load_config
    from acpo_dist.core.registry import REWARDS, resolve
    from acpo_dist.data.toy.oracle import judge_exactly

    rewards = load_config("toy_sd15", []).rewards
    metrics = {
        entry.name: resolve("reward", REWARDS, entry.type)(entry, device="cpu")
        for entry in (*rewards.train, *rewards.judges)
    }
    for path in files:
        saved = np.load(path)
        images, prompts = torch.from_numpy(saved["images"]).float() / 255, [str(text) for text in saved["prompts"]]
        with torch.no_grad():
            scores = {name: float(metric(images, prompts).mean()) for name, metric in metrics.items()}
        row = {**scores, **judge_exactly(images, prompts).as_dict()}
        cells = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if value is not None)
        sys.stdout.write(
            f"{path}: {float(saved['cpu_seconds']):.1f} CPU s, drift {float(saved['drift']):.3f}, {cells}\n"
        )


if __name__ == "__main__":
    main()
