"""LoRA files: convert the adapters of a checkpoint to common layouts, and check that a file fits a network."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acpo_dist.core.errors import ModelError
from acpo_dist.models.config import TuningConfig
from acpo_dist.models.tuning import ADAPTER

# Module names of a residual block in SDXL's original code, used by kohya's SDXL scripts and by common user interfaces.
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_DOWN = re.compile(r"lora_(A|down|linear_layer\.down)|lora\.down")
"""Names of the first of the two matrices, in peft's, kohya's and diffusers' older layouts."""
_MIDDLE = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}


def adapter_layers(weights: Mapping[str, Tensor], tuning: TuningConfig) -> dict[str, Tensor]:
    """Extract the adapters of a checkpoint: `<module>.lora_A.weight` and `<module>.lora_B.weight`, in float32.

    The LoRA scale is multiplied into lora_B, so that readers that assume alpha = rank get the same network.

    Args:
        weights: trainable weights of the checkpoint, by parameter name.
        tuning: the run's `model.tuning` section.

    Raises:
        ModelError: the run used full fine-tuning, which has no adapters.
    """
    if tuning.method != "lora":
        raise ModelError("the run tuned every weight (model.tuning.method=full), so it has no LoRA; take `merged`.")
    scale = (tuning.alpha or tuning.rank) / tuning.rank
    return {
        name.replace(f".{ADAPTER}.", "."): (value.float() * scale if ".lora_B." in name else value.float()).contiguous()
        for name, value in weights.items()
    }


def kohya_layers(layers: Mapping[str, Tensor], *, family: str, layers_per_block: int) -> dict[str, Tensor]:
    """Convert adapters to kohya's layout: `lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    As in kohya's scripts, module names are those of the original U-Net (input, middle and output blocks) for SDXL, and
    those of diffusers for Stable Diffusion 1.x and 2.x.

    Args:
        layers: result of `adapter_layers`.
        family: value of `model.type`.
        layers_per_block: `layers_per_block` of the U-Net.

    Raises:
        ModelError: a module has no name in the original U-Net.
    """
    named = {}
    for name, value in layers.items():
        module, _, kind = name.rpartition(".lora_")
        if family == "sdxl":
            module = original_name(module, layers_per_block)
        stem = f"lora_unet_{module.replace('.', '_')}"
        if kind.startswith("A"):
            named[f"{stem}.lora_down.weight"] = value
            named[f"{stem}.alpha"] = torch.tensor(float(value.shape[0]))
        else:
            named[f"{stem}.lora_up.weight"] = value
    return named


def original_name(module: str, layers_per_block: int) -> str:
    """Convert diffusers' name of a U-Net module to the name in SDXL's original code.

    Args:
        module: name in diffusers.
        layers_per_block: `layers_per_block` of the U-Net.

    Raises:
        ModelError: the module is not part of a down, middle or up block.
    """
    span = layers_per_block + 1
    parts = module.split(".")
    if parts[0] == "mid_block" and (parts[1], int(parts[2])) in _MIDDLE:
        return ".".join(["middle_block", str(_MIDDLE[parts[1], int(parts[2])]), *_inside(parts[1], parts[3:])])
    if parts[0] in ("down_blocks", "up_blocks"):
        block, kind, index = int(parts[1]), parts[2], int(parts[3])
        down = parts[0] == "down_blocks"
        root = "input_blocks" if down else "output_blocks"
        place = block * span + index + (1 if down else 0)
        if kind in ("resnets", "attentions"):
            return ".".join([root, str(place), "1" if kind == "attentions" else "0", *_inside(kind, parts[4:])])
        if kind == "downsamplers":
            return f"{root}.{(block + 1) * span}.0.op"
        if kind == "upsamplers":
            return f"{root}.{block * span + layers_per_block}.2.conv"
    raise ModelError(f"`{module}` has no name in SDXL's original code, so kohya's layout does not support it.")


def _inside(kind: str, rest: list[str]) -> list[str]:
    return [_RESNET.get(rest[0], rest[0])] if kind == "resnets" else rest


def text_width(layers: Mapping[str, Tensor]) -> int | None:
    """Width of the text embeddings of adapted cross-attention layers; None if no such layer is adapted."""
    read = re.compile(r"attn2\.to_[kv]\.lora_A\.")
    return next((int(value.shape[1]) for name, value in layers.items() if read.search(name)), None)


def check_lora_file(path: Path, unet: Any) -> tuple[int, int]:
    """Check that a file holds a LoRA for this U-Net, without loading the weights.

    Args:
        path: safetensors file.
        unet: the U-Net.

    Returns:
        (number of adapted U-Net modules, number of adapted text encoder modules).

    Raises:
        ModelError: the file cannot be read, has no LoRA layers of a U-Net, or belongs to another architecture.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"--lora: {path} cannot be read as safetensors: {error}") from error
    downs = {name: shape for name, shape in shapes.items() if _DOWN.search(name)}
    own = {name: shape for name, shape in downs.items() if "text_encoder" not in name and "lora_te" not in name}
    if not own:
        held = f"only {len(downs)} layers for text encoders" if downs else "no LoRA layers"
        raise ModelError(f"--lora: {path} holds {held}; expected low-rank layers of a U-Net.")
    width = unet.config.get("cross_attention_dim")
    found = {shape[1] for name, shape in own.items() if "attn2" in name and re.search(r"to[._][kv]", name)}
    if found and found != {width}:
        raise ModelError(
            f"--lora: {path} was made for a U-Net with text of width {_widths(found)}, and this one takes "
            f"{_widths({width})}: it belongs to another architecture."
        )
    return len(own), len(downs) - len(own)


def _widths(widths: set[Any]) -> str:
    known = {768: "768 (Stable Diffusion 1.x)", 1024: "1024 (Stable Diffusion 2.x)", 2048: "2048 (SDXL)"}
    return ", ".join(known.get(width, str(width)) for width in sorted(widths, key=str))
