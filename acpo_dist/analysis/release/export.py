"""Export a checkpoint as a LoRA file in one of two layouts or as a merged pipeline, each with a model card."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from acpo_dist.analysis.release.model_card import CardFacts, loading_code, model_card
from acpo_dist.analysis.release.verdict import guard_ending
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import CheckpointError, ModelError, UsageError
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.sizes import size_text
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.models.architectures import architecture_of, prediction_type_of
from acpo_dist.models.lora_files import adapter_layers, kohya_layers, text_width
from acpo_dist.models.schedulers import UNSHIFTED, dpmpp_timesteps, euler_sigmas, flow_line
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.open_model import prepared
from acpo_dist.training.run import export_pipeline
from acpo_dist.training.run_folder import METRICS, git_commit, read_run_config
from acpo_dist.training.trajectory.artefact import trajectory_from_mapping
from acpo_dist.workers.learner.checkpoint import Checkpoint, CheckpointStore, open_checkpoint

Format = Literal["diffusers-lora", "kohya", "merged"]
FORMATS: tuple[Format, ...] = ("diffusers-lora", "kohya", "merged")
WEIGHTS = {"raw": "policy", "ema": "ema"}
_SD2_WIDTH = 1024
"""Text width of Stable Diffusion 2.x; 1.x has 768."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Result of an export."""

    folder: Path
    file: Path
    """The LoRA file, or `model_index.json` of the pipeline."""
    card: Path
    schedule: Path | None
    """Trajectory used in training, for standard schedulers; None if the pipeline takes no trajectory."""
    iteration: int
    checksum: str
    """SHA-256 of the tuned weights, as published by the run."""
    guard: str | None
    """How the guard ended the run, and whether these weights are the ones it kept; None if it did not end the run."""


def export(source: Path, out: Path, *, layout: Format, weights: str) -> Exported:
    """Write a checkpoint's weights.

    Args:
        source: a run folder or a checkpoint folder. For a run: the newest checkpoint, or the best by the judges if the
            guard rolled the run back, as in the run's own export.
        out: folder to write; must be empty or not exist.
        layout: `diffusers-lora`, `kohya` or `merged`.
        weights: `raw` (last step) or `ema` (average over steps).

    Returns:
        Paths, iteration and checksum of the export.

    Raises:
        UsageError: unknown layout or weights, or `out` is not empty.
        ResumeError: `source` is no run.
        ModelError: no complete checkpoint, the checkpoint after a roll-back is missing, or the model takes no LoRA.
        CheckpointError: the checkpoint is damaged.
    """
    if layout not in FORMATS:
        raise UsageError(f"unknown --format {layout}; known: {', '.join(FORMATS)}")
    if weights not in WEIGHTS:
        raise UsageError(f"unknown --weights {weights}; known: {', '.join(WEIGHTS)}")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out: {out} is not empty; name a folder that does not exist yet")
    run, config, checkpoint = _find(source)
    bundle = checkpoint.bundle(WEIGHTS[weights])
    if layout == "merged":
        export_pipeline(config, bundle, out)
        file = out / "model_index.json"
    else:
        layers = adapter_layers(bundle.tensors, config.model.tuning)
        out.mkdir(parents=True, exist_ok=True)
        file = _write_lora(config, layers, out, layout, weights, checkpoint)
    schedule = _write_schedule(config, checkpoint, out)
    card = out / "README.md"
    guard = _guard(run, checkpoint)
    facts = CardFacts(
        config=config, name=config.run.name, iteration=checkpoint.iteration, metrics=_metrics(run, checkpoint),
        provenance=_provenance(config, bundle.checksum, weights), guard=guard or "It did not end the run.",
        code=loading_code(
            config, lora=None if layout == "merged" else file.name, schedule=schedule.name if schedule else None
        ),
    )  # fmt: skip
    text = model_card(facts)
    card.write_text(text, encoding="utf-8")
    return Exported(
        folder=out, file=file, card=card, schedule=schedule, iteration=checkpoint.iteration,
        checksum=bundle.checksum, guard=guard,
    )  # fmt: skip


def _find(source: Path) -> tuple[Path, Config, Checkpoint]:
    if source.parent.name == "checkpoints":
        run = source.parent.parent
        return run, prepared(read_run_config(run), run), open_checkpoint(source)
    config = prepared(read_run_config(source), source)
    store = CheckpointStore(source / "checkpoints", keep=config.checkpoint.keep)
    found = store.newest()
    if found is None:
        raise ModelError(f"{source} has no complete checkpoint yet: wait for one (checkpoint.every).")
    ending = guard_ending(source, _done(source))
    if ending is None or ending.action != "roll_back":
        return source, config, found
    if not (source / "checkpoints" / f"{ending.best:06d}").is_dir():
        liked = "the base model" if ending.best == 0 else f"iteration {ending.best}"
        raise ModelError(
            f"{source}: {ending.text}. The run was rolled back to {liked}, whose checkpoint does not exist. To "
            f"export anyway, name a checkpoint, such as {found.folder}."
        )
    return source, config, store.open(ending.best)


def _done(run: Path) -> int:
    """Return the iteration of the newest checkpoint, complete or not."""
    return max(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))


def _guard(run: Path, checkpoint: Checkpoint) -> str | None:
    ending = guard_ending(run, _done(run))
    if ending is None:
        return None
    if ending.action != "roll_back":
        return ending.text
    held = "is what it went back to" if checkpoint.iteration == ending.best else f"is not: it went to {ending.best}"
    return f"{ending.text}; iteration {checkpoint.iteration} {held}"


def _write_lora(
    config: Config, layers: Mapping[str, Any], out: Path, layout: Format, weights: str, checkpoint: Checkpoint
) -> Path:
    family = resolve("model", MODELS, config.model.type)
    if not hasattr(family, "pipeline"):
        raise ModelError(f"a `{config.model.type}` pipeline loads no LoRA; use --format merged.")
    if layout == "diffusers-lora":
        named = {f"{getattr(family, 'network_part', 'unet')}_lora_layers": dict(layers)}
        family.pipeline.save_lora_weights(out, **named, safe_serialization=True)
        return out / "pytorch_lora_weights.safetensors"
    if getattr(family, "network_part", "unet") != "unet":
        raise ModelError(
            f"kohya's layout names modules of a U-Net, and a `{config.model.type}` model has none; use "
            "--format diffusers-lora, which ComfyUI reads for transformers."
        )
    depth = architecture_of(config.model).unet["layers_per_block"]
    if not isinstance(depth, int):
        raise CheckpointError(f"layers_per_block is {depth}: kohya's layout requires the same number in all blocks")
    file = out / f"{config.run.name}.safetensors"
    rank = config.model.tuning.rank
    # Keys that readers of this layout expect; the scale is part of the weights, so alpha is the rank.
    metadata = {
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank)),
        "ss_output_name": config.run.name, "ss_steps": str(checkpoint.iteration), "acpo_weights": weights,
        **kohya_base(config, layers),
    }  # fmt: skip
    named = kohya_layers(layers, family=config.model.type, layers_per_block=depth)
    save_file(named, file, metadata=metadata)
    return file


def kohya_base(config: Config, layers: Mapping[str, Any]) -> dict[str, str]:
    """Describe the base model in the metadata keys of kohya; readers distinguish 1.x and 2.x by them."""
    kind = prediction_type_of(config.model)
    parameterised = {"v_prediction": "v", "epsilon": "epsilon"}.get(kind or "")
    said = {"modelspec.prediction_type": parameterised} if parameterised else {}
    if config.model.type == "sdxl":
        return {"ss_base_model_version": "sdxl_base_v1-0", **said}
    width = text_width(layers) or architecture_of(config.model).unet["cross_attention_dim"]
    second = width == _SD2_WIDTH
    version = ("sd_v2" if second else "sd_v1") + ("_v" if parameterised == "v" else "")
    return {"ss_base_model_version": version, "ss_v2": str(second), **said}


def _write_schedule(config: Config, checkpoint: Checkpoint, out: Path) -> Path | None:
    """Write the rollouts' trajectory for `acpo generate --schedule` and for schedulers of diffusers.

    That of a flow model is also written as a line for ComfyUI's manual sigmas (`manual_sigmas`).
    """
    found = checkpoint.state.get("trajectory")
    if found is None or not hasattr(resolve("model", MODELS, config.model.type), "pipeline"):
        return None
    trajectory = trajectory_from_mapping(found)
    plain: dict[str, dict[str, Any]]
    if trajectory.alpha_bars[0] == 0:
        plain = {"FlowMatchEulerDiscreteScheduler": {**UNSHIFTED, "sigmas": flow_line(trajectory)[:-1]}}
        found = {**found, "manual_sigmas": ", ".join(f"{sigma:.6g}" for sigma in flow_line(trajectory))}
    else:
        plain = _discrete(trajectory)
    path = out / "schedule.json"
    path.write_text(json.dumps({"trajectory": found, "diffusers": plain}, indent=1) + "\n", encoding="utf-8")
    return path


def _discrete(trajectory: Trajectory) -> dict[str, dict[str, Any]]:
    return {
        "EulerDiscreteScheduler": {"sigmas": euler_sigmas(trajectory)},
        "DPMSolverMultistepScheduler": {"timesteps": dpmpp_timesteps(trajectory)},
    }


def _metrics(run: Path, checkpoint: Checkpoint) -> dict[str, float]:
    """Return the metrics of the iteration before the checkpoint, and gains if the checkpoint is the run's last."""
    path = run / METRICS
    rows = read_metrics(path) if path.is_file() else []
    chosen = [row for row in rows if row.get("iteration") in (checkpoint.iteration - 1, checkpoint.iteration)]
    merged: dict[str, Any] = {}
    for row in chosen:
        # The row after the last iteration holds only the gain; any other later row belongs to newer weights.
        if row["iteration"] < checkpoint.iteration or all(n.startswith(("gain/", "iteration")) for n in row):
            merged |= row
    return {name: value for name, value in merged.items() if isinstance(value, float)}


def _provenance(config: Config, digest: str, weights: str) -> dict[str, str]:
    commit = git_commit()
    return {
        "run": config.run.name,
        "weights": "averaged over optimiser steps" if weights == "ema" else "of the last optimiser step",
        **_drawn_with(config),
        "weights sha256": digest,
        **({"code": commit} if commit else {}),
    }


def _drawn_with(config: Config) -> dict[str, str]:
    """Return settings of the run's images that differ from a pipeline's defaults."""
    said = {
        "revision of the base model": getattr(config.model, "revision", None),
        "image size": ", ".join(size_text(size) for size, _ in config.model.sizes) or None,
        "negative prompt": getattr(config.model, "negative_prompt", None),
    }
    return {name: str(value) for name, value in said.items() if value is not None}
