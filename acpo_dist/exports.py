"""A checkpoint as files that others open: LoRA in two layouts, or the merged pipeline, each with a model card."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors.torch import load_file, save_file

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import CheckpointError, ModelError, UsageError
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.weights import checksum, make_bundle
from acpo_dist.driver import export_pipeline
from acpo_dist.learner.checkpoint import Checkpoint, CheckpointStore, open_checkpoint
from acpo_dist.models.architectures import architecture_of
from acpo_dist.models.lora_files import adapter_layers, kohya_layers
from acpo_dist.models.schedulers import dpmpp_timesteps, euler_sigmas
from acpo_dist.promotion.card import base_licence
from acpo_dist.retiming.artefact import trajectory_from_mapping
from acpo_dist.session import METRICS, git_commit, read_run_config
from acpo_dist.sources import prepared
from acpo_dist.tracking.jsonl import read_metrics

Format = Literal["diffusers-lora", "kohya", "merged"]
FORMATS: tuple[Format, ...] = ("diffusers-lora", "kohya", "merged")
WEIGHTS = {"raw": "policy", "ema": "ema"}
_SHOWN = re.compile(r"(reward|judge)/[^/]+/mean|drift/.*|gain/.*")
_BASE_VERSION = {"sdxl": "sdxl_base_v1-0", "sd15": "sd_v1"}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    folder: Path
    file: Path
    """The LoRA file, or the pipeline's index."""
    card: Path
    schedule: Path | None
    """Trajectory that the weights were tuned along, for plain schedulers; None for a pipeline that takes none."""
    iteration: int
    checksum: str
    """SHA-256 of the tuned weights, as the run published them."""


def export(source: Path, out: Path, *, layout: Format, weights: str) -> Exported:
    """Write a checkpoint's weights.

    Args:
        source: a run (its newest checkpoint is meant), or one checkpoint of one.
        out: folder to write; it must not hold another export.
        weights: `raw` (of the last step) or `ema` (averaged over steps).

    Raises:
        UsageError: unknown layout or weights, or the folder is taken.
        ResumeError: no run.
        ModelError: no whole checkpoint, or no LoRA where one is asked for.
        CheckpointError: the checkpoint is damaged.
    """
    if layout not in FORMATS:
        raise UsageError(f"unknown --format {layout}; known: {', '.join(FORMATS)}")
    if weights not in WEIGHTS:
        raise UsageError(f"unknown --weights {weights}; known: {', '.join(WEIGHTS)}")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out: {out} is not empty; name a folder that does not exist yet")
    run, config, checkpoint = _find(source)
    tensors = load_file(checkpoint.learner_folder / f"{WEIGHTS[weights]}.safetensors")
    if layout == "merged":
        export_pipeline(config, make_bundle(int(checkpoint.state["version"]), tensors), out)
        file = out / "model_index.json"
    else:
        layers = adapter_layers(tensors, config.model.tuning)
        out.mkdir(parents=True, exist_ok=True)
        file = _write_lora(config, layers, out, layout, weights, checkpoint)
    schedule = _write_schedule(config, checkpoint, out)
    card = out / "README.md"
    facts = _facts(run, config, checkpoint, checksum(tensors), weights)
    card.write_text(_card(config, layout, file.name, schedule, facts, _figures(run, checkpoint)), encoding="utf-8")
    return Exported(
        folder=out, file=file, card=card, schedule=schedule, iteration=checkpoint.iteration,
        checksum=facts["weights sha256"],
    )  # fmt: skip


def _find(source: Path) -> tuple[Path, Config, Checkpoint]:
    if source.parent.name == "checkpoints":
        run = source.parent.parent
        return run, prepared(read_run_config(run), run), open_checkpoint(source)
    config = prepared(read_run_config(source), source)
    found = CheckpointStore(source / "checkpoints", keep=config.checkpoint.keep).newest()
    if found is None:
        raise ModelError(f"{source} has no whole checkpoint yet: wait for one (checkpoint.every).")
    return source, config, found


def _write_lora(
    config: Config, layers: Mapping[str, Any], out: Path, layout: Format, weights: str, checkpoint: Checkpoint
) -> Path:
    family = resolve("model", MODELS, config.model.type)
    if not hasattr(family, "pipeline"):
        raise ModelError(f"a `{config.model.type}` pipeline loads no LoRA; take --format merged.")
    if layout == "diffusers-lora":
        family.pipeline.save_lora_weights(out, unet_lora_layers=dict(layers), safe_serialization=True)
        return out / "pytorch_lora_weights.safetensors"
    depth = architecture_of(config.model).unet["layers_per_block"]
    if not isinstance(depth, int):
        raise CheckpointError(f"layers_per_block is {depth}: kohya's layout knows one number for all blocks")
    file = out / f"{config.run.name}.safetensors"
    rank = config.model.tuning.rank
    # What readers of this layout look up; the scale is in the weights, so alpha is the rank.
    metadata = {
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank)),
        "ss_base_model_version": _BASE_VERSION[config.model.type], "ss_output_name": config.run.name,
        "ss_steps": str(checkpoint.iteration), "acpo_weights": weights,
    }  # fmt: skip
    named = kohya_layers(layers, family=config.model.type, layers_per_block=depth)
    save_file(named, file, metadata=metadata)
    return file


def _write_schedule(config: Config, checkpoint: Checkpoint, out: Path) -> Path | None:
    """The rollouts' trajectory: as `acpo generate --schedule` reads it, and as diffusers' two schedulers take it."""
    found = checkpoint.state.get("trajectory")
    if found is None or not hasattr(resolve("model", MODELS, config.model.type), "pipeline"):
        return None
    trajectory = trajectory_from_mapping(found)
    plain = {
        "EulerDiscreteScheduler": {"sigmas": euler_sigmas(trajectory)},
        "DPMSolverMultistepScheduler": {"timesteps": dpmpp_timesteps(trajectory)},
    }
    path = out / "schedule.json"
    path.write_text(json.dumps({"trajectory": found, "diffusers": plain}, indent=1) + "\n", encoding="utf-8")
    return path


def _figures(run: Path, checkpoint: Checkpoint) -> dict[str, float]:
    """Of the last iteration before the checkpoint, and the run's gain where the checkpoint is its end."""
    path = run / METRICS
    rows = read_metrics(path) if path.is_file() else []
    chosen = [row for row in rows if row.get("iteration") in (checkpoint.iteration - 1, checkpoint.iteration)]
    merged: dict[str, Any] = {}
    for row in chosen:
        # The row after the last iteration holds the gain alone; any other is of newer weights.
        if row["iteration"] < checkpoint.iteration or all(n.startswith(("gain/", "iteration")) for n in row):
            merged |= row
    return {name: value for name, value in merged.items() if _SHOWN.fullmatch(name) and isinstance(value, float)}


def _facts(run: Path, config: Config, checkpoint: Checkpoint, digest: str, weights: str) -> dict[str, str]:
    commit = git_commit()
    return {
        "base model": _base(config),
        "algorithm": config.algorithm.type,
        "rewards (drove the update)": ", ".join(entry.name for entry in config.rewards.train),
        "judges (held out)": ", ".join(entry.name for entry in config.rewards.judges) or "none",
        "iterations": f"{checkpoint.iteration} of {config.run.iterations}",
        "weights": "averaged over optimiser steps" if weights == "ema" else "of the last optimiser step",
        "seed": str(config.run.seed),
        "run": config.run.name,
        "weights sha256": digest,
        **({"code": commit} if commit else {}),
    }


def _card(
    config: Config, layout: Format, file: str, schedule: Path | None, facts: Mapping[str, str],
    figures: Mapping[str, float],
) -> str:  # fmt: skip
    licence = base_licence(config)
    head = {
        "library_name": "diffusers",
        "base_model": _base(config),
        "tags": [*dict.fromkeys(["acpo", config.algorithm.type])],
    }
    if licence:
        head["license"] = licence
    stated = licence or "not stated by the base model's files; look it up there before you pass the model on"
    measured = "\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items())
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
            f"# {config.run.name}\n",
            f"`{_base(config)}`, tuned on no-reference image quality with acpo_dist and held near the base model.\n",
            f"## Use\n\n```python\n{_code(config, layout, file, schedule)}```\n",
            "## Provenance\n\n| what | value |\n| --- | --- |",
            *(f"| {name} | {value} |" for name, value in facts.items()),
            "\n## Measured before these weights\n\n| figure | value |\n| --- | --- |",
            measured or "| nothing recorded | |",
            f"\n## Licence\n\nThe base model's: {stated}. Tuning adds no right to it.\n",
        ]
    )


def _code(config: Config, layout: Format, file: str, schedule: Path | None) -> str:
    if layout == "merged":
        lines = ["from diffusers import DiffusionPipeline", "", 'pipeline = DiffusionPipeline.from_pretrained(".")']
    else:
        lines = [
            "from diffusers import DiffusionPipeline",
            "",
            f'pipeline = DiffusionPipeline.from_pretrained("{_base(config)}")',
            f'pipeline.load_lora_weights(".", weight_name="{file}")',
        ]
    if schedule is not None:
        # Euler is equal to DDIM on the same levels; with this spacing diffusers starts it from unit noise.
        lines = [
            "import json",
            "",
            lines[0].replace("import DiffusionPipeline", "import DiffusionPipeline, EulerDiscreteScheduler"),
            *lines[1:],
            "pipeline.scheduler = EulerDiscreteScheduler.from_config(",
            '    pipeline.scheduler.config, timestep_spacing="leading"',
            ")",
            f'with open("{schedule.name}") as schedule:',
            '    levels = json.load(schedule)["diffusers"]["EulerDiscreteScheduler"]',
            'picture = pipeline("a prompt", **levels).images[0]',
        ]
    return "\n".join([*lines, ""])


def _base(config: Config) -> str:
    """A folder's own name: where it lies is nobody's business."""
    path = config.model.path
    return Path(path).name if Path(path).is_dir() else path
