"""Checkpoint files of Stable Diffusion 3, Z-Image and FLUX.2 with the names of the original code."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from acpo_dist.models.original_files import original_vae
from acpo_dist.models.tensor_files import Entry

_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder", "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
}  # fmt: skip
_ZIMAGE = {
    "all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.",
    "attention.norm_k": "attention.k_norm", "attention.norm_q": "attention.q_norm",
    "attention.to_out.0": "attention.out",
}  # fmt: skip
_FLUX2 = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip
_FLUX2_BLOCK = {
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
}  # fmt: skip
_FLUX2_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2", "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}  # fmt: skip
_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k", "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip
_JOINED = {
    "attn": ("x_block.attn.qkv", ("to_q", "to_k", "to_v")),
    "attn.added": ("context_block.attn.qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
    "attn2": ("x_block.attn2.qkv", ("to_q", "to_k", "to_v")),
}


def write_file(
    family: str, folder: Path, file: Path, *, vae: bool = False, prefix: str = "model.diffusion_model."
) -> Path:
    """Write the transformer of a tiny pipeline folder, and the VAE of Stable Diffusion 3, as one file."""
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    named = {"sd3": _sd3, "zimage": _zimage, "flux2_klein": _flux2}[family](weights)
    tensors = {f"{prefix}{name}": value.contiguous() for name, value in named.items()}
    if vae:
        entries = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
        named = original_vae({name: Entry.of(value) for name, value in entries.items()}, 2)
        tensors |= {f"first_stage_model.{name}": entry.read() for name, entry in named}
    save_file(tensors, file)
    return file


def _sd3(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    last = max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))
    found = {"pos_embed": weights["pos_embed.pos_embed"]}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        if module in _OUTSIDE:
            found[f"{_OUTSIDE[module]}.{kind}"] = value
        elif module == "norm_out.linear":
            found[f"final_layer.adaLN_modulation.1.{kind}"] = _swapped(value)
        elif module.startswith("transformer_blocks."):
            _, index, inner = module.split(".", 2)
            if inner in _BLOCK:
                # Scale and shift of the last layer of a stream are in the other order.
                swap = inner == "norm1_context.linear" and int(index) == last
                found[f"joint_blocks.{index}.{_BLOCK[inner]}.{kind}"] = _swapped(value) if swap else value
    for index in range(last + 1):
        for key, (target, parts) in _JOINED.items():
            stem = f"transformer_blocks.{index}.{key.partition('.')[0]}"
            for kind in ("weight", "bias"):
                names = [f"{stem}.{part}.{kind}" for part in parts]
                if names[0] in weights:
                    found[f"joint_blocks.{index}.{target}.{kind}"] = torch.cat([weights[name] for name in names])
    return found


def _swapped(value: Tensor) -> Tensor:
    return torch.cat(value.chunk(2)[::-1])


def _zimage(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        if name.endswith(".attention.to_q.weight"):
            stem = name.removesuffix("to_q.weight")
            found[f"{stem}qkv.weight"] = torch.cat([weights[f"{stem}to_{letter}.weight"] for letter in "qkv"])
        elif not name.endswith((".to_k.weight", ".to_v.weight")):
            found[_renamed(name, _ZIMAGE)] = value
    return found


def _flux2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        if module in _FLUX2:
            found[f"{_FLUX2[module]}.{kind}"] = _swapped(value) if module == "norm_out.linear" else value
            continue
        group, index, inner = module.split(".", 2)
        blocks, table = (
            ("single_blocks", _FLUX2_SINGLE) if group.startswith("single") else ("double_blocks", _FLUX2_BLOCK)
        )
        if inner in table:
            found[f"{blocks}.{index}.{table[inner]}.{'scale' if '_norm' in table[inner] else kind}"] = value
    for index in range(len({name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")})):
        for target, parts in (("img_attn", "to_q to_k to_v"), ("txt_attn", "add_q_proj add_k_proj add_v_proj")):
            stem = f"transformer_blocks.{index}.attn"
            joined = torch.cat([weights[f"{stem}.{part}.weight"] for part in parts.split()])
            found[f"double_blocks.{index}.{target}.qkv.weight"] = joined
    return found


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name
