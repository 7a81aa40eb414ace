"""Runs with changed weights, for tests of exports and of the LoRA scale."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

import acpo_dist.data.toy
from acpo_dist.cli import main
from acpo_dist.config.load import dump, load_config
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.diffusion.trajectory import explicit_trajectory
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.original_files import write_single_file
from acpo_dist.models.pipeline_files import write_pipeline
from acpo_dist.models.sd15 import Sd15Family
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.training.trajectory.artefact import trajectory_to_mapping
from acpo_dist.workers.learner.checkpoint import CheckpointStore
from acpo_dist.workers.learner.engine import TorchEngine

ASSETS = Path(acpo_dist.data.toy.__file__).parent / "assets"
PROMPT = "a red circle on a white background"
FAMILIES = {"sdxl": SdxlFamily, "sd15": Sd15Family}
"""Families with a U-Net, whose LoRA files have kohya's names too."""
on_latents = pytest.mark.parametrize("kind", list(FAMILIES))
EXPORTED = (*FAMILIES, "flow")
"""Embedded toys with a latent space."""


def single_file(kind: str, folder: Path, *, velocity: bool = False, dtype=torch.float32) -> Path:
    """The toy as a checkpoint file."""
    write_pipeline(ASSETS / f"toy-{kind}", folder / "parts", dtype=torch.float32, variant=None, tuned={})
    file = folder / f"{kind}.safetensors"
    metadata = {"modelspec.prediction_type": "v"} if velocity else {}
    write_single_file(
        folder / "parts", file, family=kind, dtype=dtype, metadata=metadata, velocity=velocity, zero_snr=velocity
    )
    return file


def tuned(config):
    """Return the family with every trainable weight changed."""
    family = resolve("model", MODELS, config.model.type).load(config.model, device="cpu", trainable=True)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_tensors(family.network).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return family


def finished_run(kind: str, root: Path, *overrides: str) -> Path:
    """Write a run folder with one checkpoint of changed weights, and averages halfway between."""
    config = load_config(f"toy_{kind}", [f"run.dir={root}", "model.tuning.alpha=24", *overrides])
    family = tuned(config)
    store = CheckpointStore(root / "checkpoints", keep=2)
    partial = store.prepare(3)
    weights = TorchEngine(family.network, config.learner, accumulation=1).weights()
    save_file(weights, partial / "learner" / "policy.safetensors")
    save_file({name: value / 2 for name, value in weights.items()}, partial / "learner" / "ema.safetensors")
    # Nothing like an even spacing.
    steep = explicit_trajectory(family.alpha_bars, [999, 700, 300, 60])
    state = {"version": 3, "trajectory": trajectory_to_mapping(steep, family.alpha_bars.numpy())}
    store.commit(partial, 3, state)
    (root / "resolved.yaml").write_text(dump(config))
    rows = [{"iteration": i, "judge/strided_judge/mean": 0.1 * i, "drift/rms": 0.01 * i} for i in range(4)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def command(monkeypatch, capsys, *arguments) -> tuple[int, dict, str]:
    monkeypatch.setattr(sys, "argv", ["acpo", *map(str, arguments), "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    out, err = capsys.readouterr()
    # In process the libraries' own lines come before the answer.
    return done.value.code, json.loads(out.splitlines()[-1]) if out else {}, err


def opened(folder: Path, kind: str):
    """Open a pipeline folder in plain diffusers, which opens one without T5 only if its parts are named."""
    absent = dict.fromkeys(("tokenizer_3", "text_encoder_3")) if kind == "flow" else {}
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **absent)


def base(kind: str):
    pipeline = opened(ASSETS / f"toy-{kind}", kind)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def image(pipeline, **options) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    asked = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "pt", **options}
    return pipeline(PROMPT, generator=generator, **asked).images
