"""Module names of Stable Diffusion: diffusers, the original code (LDM, SGM), and LoRA files of kohya's scripts.

LoRA files of kohya's scripts name a module by a prefix and its path with underscores. The U-Net of SDXL has the names
of the original code there (`lora_unet_input_blocks_4_1_proj_in`), the U-Net of 1.x and 2.x those of diffusers.
"""

from collections.abc import Mapping
from typing import Any

from acpo_dist.core.errors import ModelError

TEXT_PARTS = ("text_encoder", "text_encoder_2")
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_MIDDLE = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}


def original_name(module: str, unet: Mapping[str, Any]) -> str:
    """Convert the name of a U-Net module from diffusers to the original code.

    Args:
        module: name in diffusers.
        unet: configuration of the U-Net.

    Raises:
        ModelError: the module has no counterpart in the original code.
    """
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    depth = unet["layers_per_block"]
    if not isinstance(depth, int):
        raise ModelError(f"the U-Net has layers_per_block {depth}; the original code has one number for all blocks.")
    parts = module.split(".")
    if parts[0] == "mid_block" and (parts[1], int(parts[2])) in _MIDDLE:
        return ".".join(["middle_block", str(_MIDDLE[parts[1], int(parts[2])]), *_inside(parts[1], parts[3:])])
    if parts[0] in ("down_blocks", "up_blocks"):
        block, kind, index = int(parts[1]), parts[2], int(parts[3])
        down, span = parts[0] == "down_blocks", depth + 1
        root = "input_blocks" if down else "output_blocks"
        if kind in ("resnets", "attentions"):
            place = block * span + index + (1 if down else 0)
            return ".".join([root, str(place), "1" if kind == "attentions" else "0", *_inside(kind, parts[4:])])
        if kind == "downsamplers":
            return f"{root}.{(block + 1) * span}.0.op"
        if kind == "upsamplers":
            # The upsampler follows the attention of its last layer, or the residual layer where there is none.
            place = 2 if "Attn" in unet["up_block_types"][block] else 1
            return f"{root}.{block * span + depth}.{place}.conv"
    raise ModelError(f"the U-Net module `{module}` has no name in the original code of Stable Diffusion.")


def _inside(kind: str, rest: list[str]) -> list[str]:
    return [_RESNET.get(rest[0], rest[0]), *rest[1:]] if kind == "resnets" else rest


def kohya_name(part: str, module: str, *, family: str, unet: Mapping[str, Any]) -> str:
    """Name of a module in LoRA files of kohya's scripts, which ComfyUI, A1111 and diffusers read too.

    Args:
        part: `unet`, `text_encoder` or `text_encoder_2`.
        module: name in diffusers or transformers; `text_model.` may be missing.
        family: value of `model.type`.
        unet: configuration of the U-Net.

    Raises:
        ModelError: a U-Net module has no counterpart in the original code.
    """
    if part == "unet":
        return f"lora_unet_{original_name(module, unet) if family == 'sdxl' else module}".replace(".", "_")
    prefix = "lora_te" if family != "sdxl" else f"lora_te{TEXT_PARTS.index(part) + 1}"
    return f"{prefix}_{text_name(module)}".replace(".", "_")


def text_name(module: str) -> str:
    """Name of a text encoder's module with `text_model.`, which transformers 5 omits for `CLIPTextModel`."""
    return module if module.startswith(("text_model.", "text_projection")) else f"text_model.{module}"
