"""Metadata of LoRA files and single-file checkpoints: `modelspec.*` (Stability AI) and `ss_*` (kohya's scripts)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from acpo_dist.models.architectures import architecture_of, prediction_type_of
from acpo_dist.models.lora_files import text_width

SD2_WIDTH = 1024
"""Text width of Stable Diffusion 2.x; 1.x has 768."""
_ORIGINAL = "https://github.com/Stability-AI/generative-models"


def model_metadata(model: Any, *, title: str, date: str, lora: bool, width: int | None = None) -> dict[str, str]:
    """`modelspec.*` entries.

    Args:
        model: the `model` section.
        title: name of the file's content.
        date: ISO 8601 time at which the weights were made.
        lora: whether the file holds a LoRA instead of a whole model.
        width: text width that the U-Net reads; None reads it from the model.
    """
    kind = prediction_type_of(model)
    velocity = kind == "v_prediction"
    if model.type == "sdxl":
        architecture = "stable-diffusion-xl-v1-base"
    elif _is_second(model, width):
        architecture = "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"
    else:
        architecture = "stable-diffusion-v1"
    said = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora" if lora else architecture,
        # A LoRA of 1.x or 2.x has the module names of diffusers, every other file those of the original code.
        "modelspec.implementation": "diffusers" if lora and model.type != "sdxl" else _ORIGINAL,
        "modelspec.title": title,
        "modelspec.date": date,
    }
    if kind in ("v_prediction", "epsilon"):
        said["modelspec.prediction_type"] = "v" if velocity else "epsilon"
    return said


def training_metadata(model: Any, layers: Mapping[str, Tensor]) -> dict[str, str]:
    """`ss_*` entries that describe the base model and the network of a LoRA file.

    Args:
        model: the `model` section.
        layers: result of `adapter_layers`.
    """
    ranks = {int(value.shape[0]) for name, value in layers.items() if name.endswith(".lora_A.weight")}
    # The scale is in the weights, so alpha is the rank.
    said = {"ss_network_module": "networks.lora"}
    if len(ranks) == 1:
        rank = ranks.pop()
        said |= {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    if model.type == "sdxl":
        return {**said, "ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
    second, velocity = _is_second(model, text_width(layers)), prediction_type_of(model) == "v_prediction"
    version = ("sd_v2" if second else "sd_v1") + ("_v" if velocity else "")
    return {**said, "ss_base_model_version": version, "ss_v2": str(second)}


def _is_second(model: Any, width: int | None) -> bool:
    return (width or architecture_of(model).unet["cross_attention_dim"]) == SD2_WIDTH
