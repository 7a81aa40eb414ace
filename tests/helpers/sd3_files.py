"""Checkpoint files of Stable Diffusion 3 with the names of the original code (MM-DiT)."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from acpo_dist.models.original_files import _vae
from acpo_dist.models.tensor_files import Entry

_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder", "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
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


def write_sd3_file(folder: Path, file: Path, *, vae: bool = True, prefix: str = "model.diffusion_model.") -> Path:
    """Write transformer and VAE of a tiny pipeline folder as one file."""
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors = {f"{prefix}{name}": value.contiguous() for name, value in _transformer(weights).items()}
    if vae:
        entries = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
        named = _vae({name: Entry.of(value) for name, value in entries.items()}, 2)
        tensors |= {f"first_stage_model.{name}": entry.read() for name, entry in named}
    save_file(tensors, file)
    return file


def _transformer(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
