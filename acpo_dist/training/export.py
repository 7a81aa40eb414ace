"""Write tuned weights in the layouts that others read: a LoRA file, or the merged model."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import ModelError, UsageError
from acpo_dist.core.files import legal_name
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.types import WeightBundle
from acpo_dist.models.architectures import architecture_of
from acpo_dist.models.family import copy_weights
from acpo_dist.models.file_metadata import model_metadata, training_metadata
from acpo_dist.models.lora_files import adapter_layers, diffusers_layers, kohya_layers, text_width, write_lora
from acpo_dist.models.noise_levels import read_schedule
from acpo_dist.models.original_files import write_single_file
from acpo_dist.models.schedulers import UNSHIFTED, dpmpp_timesteps, euler_sigmas, flow_line
from acpo_dist.tracking.jsonl import replace_file
from acpo_dist.training.run_folder import RunFolder
from acpo_dist.training.trajectory.artefact import trajectory_from_mapping
from acpo_dist.workers.learner.checkpoint import Checkpoint

Format = Literal["comfy", "kohya", "diffusers", "merged", "single-file"]
FORMATS: tuple[Format, ...] = ("comfy", "kohya", "diffusers", "merged", "single-file")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
EXPORT_FACTS = "acpo.json"
SCHEDULE, SIGMAS = "schedule.json", "sigmas.txt"
_KOHYA_FAMILIES = ("sdxl", "sd15")
"""Families whose LoRA files have kohya's names."""


def default_format(config: Config) -> Format:
    """Format of a run's own export: a LoRA file if it trained a LoRA that a pipeline loads, else the merged model."""
    if config.model.tuning.method != "lora" or not hasattr(resolve("model", MODELS, config.model.type), "pipeline"):
        return "merged"
    return "comfy" if config.model.type in _KOHYA_FAMILIES else "diffusers"


def write_weights(
    config: Config, bundle: WeightBundle, out: Path, *, layout: Format, dtype: str = "fp32", weights: str = "raw",
    iteration: int, made: float | None = None,
) -> Path:  # fmt: skip
    """Write the weights of a checkpoint.

    Args:
        config: the run's configuration.
        bundle: the weights, in float32.
        out: folder to write.
        layout: a name in `FORMATS`; `comfy` and `kohya` are one layout.
        dtype: a name in `DTYPES`.
        weights: `raw` or `ema`, for the metadata.
        iteration: iteration of the checkpoint.
        made: time of the checkpoint in seconds since the epoch; None is now.

    Returns:
        The LoRA file, the checkpoint file, or the pipeline's `model_index.json`.

    Raises:
        UsageError: unknown data type, or a format that the model family does not have.
        ModelError: no LoRA where one is asked for, or the base model is not available.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown --dtype {dtype}; known: {', '.join(DTYPES)}")
    if layout == "merged":
        write_merged(config, bundle, out, dtype=DTYPES[dtype])
        return out / "model_index.json"
    date = datetime.now(UTC) if made is None else datetime.fromtimestamp(made, UTC)
    about: dict[str, Any] = {"title": config.run.name, "date": date.replace(microsecond=0).isoformat()}
    if layout == "single-file":
        return _write_single_file(config, bundle, out, DTYPES[dtype], about)
    return _write_lora(config, bundle, out, layout, DTYPES[dtype], weights, iteration, about)


def _write_lora(
    config: Config, bundle: WeightBundle, out: Path, layout: Format, dtype: torch.dtype, weights: str, iteration: int,
    about: Mapping[str, Any],
) -> Path:  # fmt: skip
    model = config.model
    layers = adapter_layers(bundle.tensors, model.tuning)
    family = resolve("model", MODELS, model.type)
    if not hasattr(family, "pipeline"):
        raise ModelError(f"a `{model.type}` pipeline loads no LoRA; take --format merged.")
    metadata = {
        "ss_output_name": config.run.name, "ss_steps": str(iteration), "ss_seed": str(config.run.seed),
        "ss_learning_rate": str(config.learner.learning_rate), "acpo_weights": weights,
        "acpo_policy_sha256": bundle.checksum,
    }  # fmt: skip
    if model.type in _KOHYA_FAMILIES:
        metadata |= training_metadata(model, layers)
        metadata |= model_metadata(model, lora=True, width=text_width(layers), **about)
    if layout == "diffusers":
        file, part = out / "pytorch_lora_weights.safetensors", getattr(family, "network_part", "unet")
        named = diffusers_layers(layers, part=part)
    elif model.type in _KOHYA_FAMILIES:
        file = out / f"{legal_name(config.run.name)}.safetensors"
        named = kohya_layers(layers, family=model.type, unet=architecture_of(model).unet)
    else:
        raise ModelError(
            f"kohya's layout names modules of a U-Net, and a `{model.type}` model has none; use --format diffusers, "
            "which ComfyUI reads for transformers."
        )
    write_lora(file, named, metadata, dtype)
    return file


def _write_single_file(
    config: Config, bundle: WeightBundle, out: Path, dtype: torch.dtype, about: Mapping[str, Any]
) -> Path:
    model = config.model
    if model.type not in _KOHYA_FAMILIES:
        raise UsageError(f"--format single-file is defined for sdxl and sd15, found {model.type}; take merged.")
    file = out / f"{legal_name(config.run.name)}.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out) as scratch:
        folder = Path(scratch)
        write_merged(config, bundle, folder, dtype=dtype)
        schedule = read_schedule(str(folder))
        write_single_file(
            folder, file, family=model.type, dtype=dtype, velocity=schedule.prediction_type == "v_prediction",
            zero_snr=bool(schedule.config.get("rescale_betas_zero_snr")),
            metadata=model_metadata(model, lora=False, **about),
        )  # fmt: skip
    return file


def write_merged(config: Config, bundle: WeightBundle, out: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write the tuned model as a diffusers pipeline folder.

    In bfloat16 the base weights under a LoRA and fully tuned weights are rounded.
    """
    model = resolve("model", MODELS, config.model.type)
    if hasattr(model, "write_pipeline"):
        model.write_pipeline(config.model, bundle.tensors, out, dtype=dtype)
        return
    family = model.load(config.model.model_copy(update={"dtype": "float32"}), device="cpu", trainable=False)
    copy_weights(family.network, bundle.tensors)
    family.save_pipeline(out)


def write_schedule(config: Config, state: Mapping[str, Any], out: Path) -> Path | None:
    """Write the trajectory of a checkpoint: `schedule.json` for `acpo generate` and diffusers, `sigmas.txt` to paste.

    Args:
        config: the run's configuration.
        state: state of the checkpoint.
        out: folder to write.

    Returns:
        `schedule.json`; None if the checkpoint has no trajectory, or the model's pipeline takes none.
    """
    found = state.get("trajectory")
    if found is None or not hasattr(resolve("model", MODELS, config.model.type), "pipeline"):
        return None
    trajectory = trajectory_from_mapping(found)
    plain: dict[str, dict[str, Any]]
    if trajectory.alpha_bars[0] == 0:
        sigmas = flow_line(trajectory)
        plain = {"FlowMatchEulerDiscreteScheduler": {**UNSHIFTED, "sigmas": sigmas[:-1]}}
    else:
        sigmas = euler_sigmas(trajectory)
        plain = {
            "EulerDiscreteScheduler": {"sigmas": sigmas},
            "DPMSolverMultistepScheduler": {"timesteps": dpmpp_timesteps(trajectory)},
        }
    line = ", ".join(f"{sigma:.6g}" for sigma in sigmas)
    content = {"trajectory": found, "manual_sigmas": line, "diffusers": plain}
    out.mkdir(parents=True, exist_ok=True)
    (out / SCHEDULE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    # As ComfyUI's manual sigmas and other user interfaces take them.
    (out / SIGMAS).write_text(f"{line}\n", encoding="utf-8")
    return out / SCHEDULE


def export_run(
    config: Config, folder: RunFolder, bundle: WeightBundle, *, iteration: int, checkpoint: Checkpoint | None
) -> None:
    """Write the run's export, and a file that names the weights it holds.

    Args:
        config: the run's configuration.
        folder: the run's folder.
        bundle: the weights, in float32.
        iteration: iteration of the weights; 0 is the base model.
        checkpoint: where the weights come from; None for base weights without a checkpoint.
    """
    # An export without this file counts as incomplete.
    (folder.export / EXPORT_FACTS).unlink(missing_ok=True)
    layout = default_format(config)
    made = checkpoint.made if checkpoint else None
    file = write_weights(config, bundle, folder.export, layout=layout, iteration=iteration, made=made)
    if checkpoint:
        write_schedule(config, checkpoint.state, folder.export)
    facts = {
        "iteration": iteration, "policy_version": bundle.version, "policy_sha256": bundle.checksum, "format": layout,
        "file": file.name,
    }  # fmt: skip
    replace_file(folder.export / EXPORT_FACTS, (json.dumps(facts, indent=2) + "\n").encode())


def read_export_facts(folder: Path) -> dict[str, Any] | None:
    """Weights in a run's export (`iteration`, `policy_sha256`, `format`, `file`, ...); None if it is incomplete."""
    try:
        return json.loads((folder / EXPORT_FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
