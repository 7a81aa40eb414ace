"""Write a pipeline folder as one checkpoint file with the names of the original code (LDM, SGM)."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acpo_dist.core.errors import ModelError
from acpo_dist.core.json_text import read_object
from acpo_dist.models.module_names import original_name, text_name
from acpo_dist.models.pipeline_files import component
from acpo_dist.models.tensor_files import Entry, write_tensors

_VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
_OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
_OPEN_CLIP_OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


def write_single_file(
    folder: Path, file: Path, *, family: str, dtype: torch.dtype, metadata: Mapping[str, str], velocity: bool,
    zero_snr: bool,
) -> None:  # fmt: skip
    """Write a pipeline folder as one `.safetensors` checkpoint, as ComfyUI, A1111 and kohya's scripts load it.

    Args:
        folder: pipeline folder of Stable Diffusion 1.x, 2.x or SDXL; files without a variant.
        file: the file to write.
        family: `sd15` or `sdxl`.
        dtype: data type of the weights.
        metadata: texts of the header.
        velocity: whether the model predicts v; SDXL files say so by the key `v_pred`.
        zero_snr: whether the schedule has zero terminal SNR (key `ztsnr`).

    Raises:
        ModelError: a component is missing or has no counterpart in the original code.
    """
    entries: dict[str, Entry] = {}
    with ExitStack() as stack:

        def read(part: str) -> tuple[dict[str, Entry], dict[str, Any]]:
            config = read_object(folder / part / "config.json")
            return stack.enter_context(component(folder / part, None)), config

        weights, unet = read("unet")
        for name, entry in weights.items():
            module, _, kind = name.rpartition(".")
            entries[f"model.diffusion_model.{original_name(module, unet)}.{kind}"] = entry
        weights, vae = read("vae")
        entries |= {
            f"first_stage_model.{name}": entry for name, entry in original_vae(weights, len(vae["up_block_types"]))
        }
        if family == "sdxl":
            clip, open_clip = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
            entries |= {f"{clip}{text_name(name)}": entry for name, entry in read("text_encoder")[0].items()}
            entries |= {f"{open_clip}{name}": entry for name, entry in _open_clip(read("text_encoder_2")[0])}
        elif unet["cross_attention_dim"] == 1024:
            entries |= {f"cond_stage_model.model.{name}": e for name, e in _open_clip(read("text_encoder")[0])}
        else:
            prefix = "cond_stage_model.transformer."
            entries |= {f"{prefix}{text_name(name)}": entry for name, entry in read("text_encoder")[0].items()}
        entries = {name: entry.cast(dtype) for name, entry in entries.items()}
        for name, stated in (("v_pred", velocity and family == "sdxl"), ("ztsnr", zero_snr)):
            if stated:
                entries[name] = Entry.of(torch.empty(0))
        write_tensors(file, entries, metadata)


def original_vae(weights: Mapping[str, Entry], blocks: int) -> Iterator[tuple[str, Entry]]:
    """Yield the entries of a VAE by their names in the original code of Stable Diffusion, without a prefix.

    Args:
        weights: entries by diffusers' names.
        blocks: number of up blocks, which the original code counts from the other end.

    Raises:
        ModelError: a module has no name there.
    """
    for name, entry in weights.items():
        module, _, kind = name.rpartition(".")
        parts = module.split(".")
        if "attentions" in parts:
            side, inner = parts[0], ".".join(parts[4:])
            if inner not in _VAE_ATTENTION:
                raise ModelError(f"the VAE module `{module}` has no name in the original code of Stable Diffusion.")
            if kind == "weight" and len(entry.shape) == 2:
                # The original code has convolutions of size 1.
                entry = _reshaped(entry, (*entry.shape, 1, 1))
            yield f"{side}.mid.attn_1.{_VAE_ATTENTION[inner]}.{kind}", entry
        elif "resnets" in parts:
            inner = ["nin_shortcut" if part == "conv_shortcut" else part for part in parts]
            at = inner.index("resnets")
            if inner[1] == "mid_block":
                place = f"mid.block_{int(inner[at + 1]) + 1}"
            else:
                side, block = (
                    ("down", int(inner[2])) if inner[1] == "down_blocks" else ("up", blocks - 1 - int(inner[2]))
                )
                place = f"{side}.{block}.block.{inner[at + 1]}"
            yield ".".join([inner[0], place, *inner[at + 2 :], kind]), entry
        elif "downsamplers" in parts:
            yield f"{parts[0]}.down.{parts[2]}.downsample.conv.{kind}", entry
        elif "upsamplers" in parts:
            yield f"{parts[0]}.up.{blocks - 1 - int(parts[2])}.upsample.conv.{kind}", entry
        else:
            yield name.replace("conv_norm_out", "norm_out"), entry


def _open_clip(weights: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
    named = {text_name(name): entry for name, entry in weights.items()}
    for name, entry in named.items():
        if name in _OPEN_CLIP_OUTSIDE:
            yield _OPEN_CLIP_OUTSIDE[name], entry
        elif name == "text_projection.weight":
            yield "text_projection", _transposed(entry)
        elif name.startswith("text_model.encoder.layers."):
            index, _, inner = name.removeprefix("text_model.encoder.layers.").partition(".")
            module, _, kind = inner.rpartition(".")
            block = f"transformer.resblocks.{index}"
            if module == "self_attn.q_proj":
                stem = name.removesuffix(f"q_proj.{kind}")
                three = [named[f"{stem}{letter}_proj.{kind}"] for letter in "qkv"]
                yield f"{block}.attn.in_proj_{kind}", _joined(three)
            elif module in _OPEN_CLIP:
                yield f"{block}.{_OPEN_CLIP[module]}.{kind}", entry


def _reshaped(entry: Entry, shape: tuple[int, ...]) -> Entry:
    return Entry(shape=shape, dtype=entry.dtype, read=lambda: entry.read().reshape(shape))


def _transposed(entry: Entry) -> Entry:
    return Entry(shape=entry.shape[::-1], dtype=entry.dtype, read=lambda: entry.read().T)


def _joined(entries: list[Entry]) -> Entry:
    def read() -> Tensor:
        return torch.cat([entry.read() for entry in entries])

    rows = sum(entry.shape[0] for entry in entries)
    return Entry(shape=(rows, *entries[0].shape[1:]), dtype=entries[0].dtype, read=read)
