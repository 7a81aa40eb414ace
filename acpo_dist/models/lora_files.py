"""LoRA files: the adapters of a checkpoint in the layouts that others read, and a check that a file fits a network."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acpo_dist.core.errors import ModelError
from acpo_dist.models.config import TuningConfig
from acpo_dist.models.lycoris import kind_of
from acpo_dist.models.module_names import kohya_name
from acpo_dist.models.tensor_files import Entry, write_tensors
from acpo_dist.models.tuning import ADAPTER, lora_factor

_DOWN = re.compile(r"lora_(A|down|linear_layer\.down)|lora\.down")
"""Names of the first of the two matrices, in peft's, kohya's and diffusers' older layouts."""
_PARAMETER = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?$")


def adapter_layers(weights: Mapping[str, Tensor], tuning: TuningConfig) -> dict[str, Tensor]:
    """Extract the adapters of a checkpoint: `<module>.lora_A.weight` and `<module>.lora_B.weight`, in float32.

    The LoRA scale is multiplied into lora_B, so that readers that assume alpha = rank get the same network. DoRA has
    `<module>.lora_magnitude_vector` too.

    Args:
        weights: trainable weights of the checkpoint, by parameter name.
        tuning: the run's `model.tuning` section.

    Raises:
        ModelError: the run used full fine-tuning, which has no adapters.
    """
    if tuning.method != "lora":
        raise ModelError("the run tuned every weight (model.tuning.method=full), so it has no LoRA; take `merged`.")
    scale, layers = lora_factor(tuning), {}
    for name, value in weights.items():
        plain = name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")
        if ".lora_magnitude_vector" in plain:
            plain = plain.removesuffix(".weight")
        layers[plain] = (value.float() * scale if ".lora_B." in plain else value.float()).contiguous()
    return layers


def diffusers_layers(layers: Mapping[str, Tensor], *, part: str = "unet") -> dict[str, Tensor]:
    """Convert adapters to diffusers' layout, which has peft's names behind the name of the network."""
    return {f"{part}.{name}": value for name, value in layers.items()}


def kohya_layers(
    layers: Mapping[str, Tensor], *, family: str, unet: Mapping[str, Any], part: str = "unet"
) -> dict[str, Tensor]:
    """Convert adapters to kohya's layout: `lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    ComfyUI, A1111 and its forks, kohya's scripts and diffusers load it. DoRA has `.dora_scale` too.

    Args:
        layers: result of `adapter_layers`.
        family: value of `model.type`.
        unet: configuration of the U-Net.
        part: `unet`, `text_encoder` or `text_encoder_2`.

    Raises:
        ModelError: a module has no name in the original U-Net.
    """
    named = {}
    for name, value in layers.items():
        found = _PARAMETER.search(name)
        assert found is not None, name
        stem = kohya_name(part, name[: found.start()], family=family, unet=unet)
        if found[1] == "lora_A":
            named[f"{stem}.lora_down.weight"] = value
            named[f"{stem}.alpha"] = torch.tensor(float(value.shape[0]))
        elif found[1] == "lora_B":
            named[f"{stem}.lora_up.weight"] = value
        else:
            # One value per output: readers compare the first axis with the outputs of the layer.
            outputs = layers[name.replace("lora_magnitude_vector", "lora_B.weight")]
            named[f"{stem}.dora_scale"] = value.reshape(len(outputs), *[1] * (outputs.ndim - 1)).contiguous()
    return named


def write_lora(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype) -> None:
    """Write a LoRA file with the hashes by which user interfaces find a file again.

    Args:
        path: the file.
        tensors: layers in their final layout.
        metadata: texts of the header; hashes are added.
        dtype: data type of the layers.
    """
    final = {name: value.to(dtype).contiguous() for name, value in sorted(tensors.items())}
    # As kohya's scripts compute them: over the file with the `ss_` entries alone, since others may change later.
    data = safetensors.torch.save(final, {name: value for name, value in metadata.items() if name.startswith("ss_")})
    digest = hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    hashes = {
        "sshs_model_hash": digest,
        "sshs_legacy_hash": hashlib.sha256(memoryview(data)[0x100000:0x110000]).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{digest}",
    }
    # Written here, because the library orders the header at random: the same weights give the same file.
    write_tensors(path, {name: Entry.of(value) for name, value in final.items()}, dict(metadata) | hashes)


def text_width(layers: Mapping[str, Tensor]) -> int | None:
    """Width of the text embeddings of adapted cross-attention layers; None if no such layer is adapted."""
    read = re.compile(r"attn2\.to_[kv]\.lora_A\.")
    return next((int(value.shape[1]) for name, value in layers.items() if read.search(name)), None)


def check_lora_file(path: Path, network: Any) -> tuple[int, int]:
    """Check that a file holds a LoRA for this U-Net or transformer, without loading the weights.

    Args:
        path: safetensors file.
        network: the U-Net or transformer.

    Returns:
        (number of adapted modules of the network, number of adapted text encoder modules).

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
        kind = kind_of({name.rpartition(".")[2]: torch.empty(0) for name in shapes})
        if kind is not None:
            raise ModelError(
                f"--lora: {path} holds {kind} layers, which diffusers does not load. Name it in model.loras of a "
                "configuration: it is merged into the base model there."
            )
        held = f"only {len(downs)} layers for text encoders" if downs else "no LoRA layers"
        raise ModelError(f"--lora: {path} holds {held}; expected low-rank layers of a U-Net or transformer.")
    width = network.config.get("cross_attention_dim")
    found = {shape[1] for name, shape in own.items() if "attn2" in name and re.search(r"to[._][kv]", name)}
    # A transformer of SD 3.5 has attn2 too, for the image alone.
    if found and width is not None and found != {width}:
        raise ModelError(
            f"--lora: {path} was made for a U-Net with text of width {_widths(found)}, and this one takes "
            f"{_widths({width})}: it belongs to another architecture."
        )
    return len(own), len(downs) - len(own)


def _widths(widths: set[Any]) -> str:
    known = {768: "768 (Stable Diffusion 1.x)", 1024: "1024 (Stable Diffusion 2.x)", 2048: "2048 (SDXL)"}
    return ", ".join(known.get(width, str(width)) for width in sorted(widths, key=str))
