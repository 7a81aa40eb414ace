"""Merge `model.loras` into a base model, once, in the cache of converted models."""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from acpo_dist.core.json_text import read_object
from acpo_dist.models.lora_reading import Layers, lora_file, module_shapes, read_lora
from acpo_dist.models.module_names import TEXT_PARTS
from acpo_dist.models.pipeline_files import STEMS, component, merged, weight_files
from acpo_dist.models.single_file import cached_folder
from acpo_dist.models.tensor_files import write_tensors
from acpo_dist.models.text import content_digest


def fused_folder(folder: Path, config: Any) -> Path:
    """Pipeline folder of a base model with `model.loras` merged.

    Adapted components are written in float32, so that nothing is rounded; the others are links to the base model.

    Args:
        folder: pipeline folder of the base model.
        config: the `model` section.

    Raises:
        ModelError: a file cannot be read or belongs to another architecture.
    """
    files = [(lora_file(entry.path, "model.loras"), entry.scale) for entry in config.loras]
    adapted = [path for part in _parts(folder) for path in weight_files(folder / part, config.variant)]
    facts = {
        "base": [(str(path.absolute()), content_digest(path)) for path in adapted],
        "loras": [(content_digest(path), scale) for path, scale in files], "variant": config.variant,
    }  # fmt: skip
    return cached_folder(f"{folder.name}-loras", facts, lambda out: _fuse(folder, files, config, out))


def _parts(folder: Path) -> list[str]:
    """Components that a LoRA can adapt."""
    return [part for part in ("unet", *TEXT_PARTS) if (folder / part).is_dir()]


def _fuse(folder: Path, files: list[tuple[Path, float]], config: Any, out: Path) -> None:
    unet = read_object(folder / "unet" / "config.json")
    with ExitStack() as stack:
        weights = {part: stack.enter_context(component(folder / part, config.variant)) for part in _parts(folder)}
        shapes = {part: module_shapes(found) for part, found in weights.items()}
        adapted: set[str] = set()
        for path, scale in files:
            layers: Layers = read_lora(path, shapes, unet, key="model.loras")
            adapted |= set(layers)
            for part, found in layers.items():
                weights[part] = merged(weights[part], found, scale)
        for entry in folder.iterdir():
            if entry.name not in adapted:
                _link(entry, out / entry.name)
        for part in adapted:
            (out / part).mkdir()
            for file in (folder / part).iterdir():
                if file.suffix in (".json", ".txt") and ".index." not in file.name:
                    shutil.copyfile(file, out / part / file.name)
            marked = f".{config.variant}" if config.variant else ""
            name = f"{STEMS[part in TEXT_PARTS]}{marked}.safetensors"
            write_tensors(out / part / name, {k: entry.cast(torch.float32) for k, entry in weights[part].items()})


def _link(source: Path, target: Path) -> None:
    os.symlink(source.resolve(), target, target_is_directory=source.is_dir())
