"""Names in exported LoRA files: the published rules of ComfyUI and kohya's scripts, for every layer of the real models.

The rules are written down here as facts and share no code with the package:

- kohya's scripts (sd-scripts, `networks/lora.py`): a module is `lora_unet_` and its path with underscores; the U-Net of
  SDXL is the original one (`library/sdxl_original_unet.py`), the U-Net of 1.x has the paths of diffusers. Encoders:
  `lora_te_` (1.x, 2.x), `lora_te1_` and `lora_te2_` (SDXL), with the paths of transformers 4.
- ComfyUI (`comfy/lora.py`, `model_lora_keys_unet`): `lora_unet_` and the path in the original U-Net, and the same with
  the path of diffusers as `unet_to_diffusers` maps it (`comfy/utils.py`).
"""

import hashlib
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from acpo_dist.models.architectures import PUBLISHED
from acpo_dist.models.lora_files import kohya_layers, write_lora

# Blocks of SDXL's original U-Net, by diffusers' names: the table of `unet_to_diffusers` written out.
SDXL_BLOCKS = {
    "conv_in": "input_blocks_0_0", "time_embedding_linear_1": "time_embed_0", "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2", "conv_out": "out_2",
    "down_blocks_0_resnets_0": "input_blocks_1_0", "down_blocks_0_resnets_1": "input_blocks_2_0",
    "down_blocks_0_downsamplers_0_conv": "input_blocks_3_0_op",
    "down_blocks_1_resnets_0": "input_blocks_4_0", "down_blocks_1_attentions_0": "input_blocks_4_1",
    "down_blocks_1_resnets_1": "input_blocks_5_0", "down_blocks_1_attentions_1": "input_blocks_5_1",
    "down_blocks_1_downsamplers_0_conv": "input_blocks_6_0_op",
    "down_blocks_2_resnets_0": "input_blocks_7_0", "down_blocks_2_attentions_0": "input_blocks_7_1",
    "down_blocks_2_resnets_1": "input_blocks_8_0", "down_blocks_2_attentions_1": "input_blocks_8_1",
    "mid_block_resnets_0": "middle_block_0", "mid_block_attentions_0": "middle_block_1",
    "mid_block_resnets_1": "middle_block_2",
    "up_blocks_0_resnets_0": "output_blocks_0_0", "up_blocks_0_attentions_0": "output_blocks_0_1",
    "up_blocks_0_resnets_1": "output_blocks_1_0", "up_blocks_0_attentions_1": "output_blocks_1_1",
    "up_blocks_0_resnets_2": "output_blocks_2_0", "up_blocks_0_attentions_2": "output_blocks_2_1",
    "up_blocks_0_upsamplers_0_conv": "output_blocks_2_2_conv",
    "up_blocks_1_resnets_0": "output_blocks_3_0", "up_blocks_1_attentions_0": "output_blocks_3_1",
    "up_blocks_1_resnets_1": "output_blocks_4_0", "up_blocks_1_attentions_1": "output_blocks_4_1",
    "up_blocks_1_resnets_2": "output_blocks_5_0", "up_blocks_1_attentions_2": "output_blocks_5_1",
    "up_blocks_1_upsamplers_0_conv": "output_blocks_5_2_conv",
    "up_blocks_2_resnets_0": "output_blocks_6_0", "up_blocks_2_resnets_1": "output_blocks_7_0",
    "up_blocks_2_resnets_2": "output_blocks_8_0",
}  # fmt: skip
RESNET = {
    "conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "conv2": "out_layers_3", "conv_shortcut": "skip_connection"
}  # fmt: skip


def sdxl_rule(module: str) -> str:
    """kohya's and ComfyUI's name of a module of SDXL's U-Net."""
    path = module.replace(".", "_")
    block = next(name for name in SDXL_BLOCKS if path == name or path.startswith(f"{name}_"))
    rest = path.removeprefix(block).removeprefix("_")
    rest = RESNET.get(rest, rest) if "_resnets_" in block else rest
    return "_".join(["lora_unet", SDXL_BLOCKS[block], *([rest] if rest else [])])


def meta_unet(kind: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(PUBLISHED[kind].unet))


def meta_text(config, kind: type) -> torch.nn.Module:
    with torch.device("meta"):
        return kind(CLIPTextConfig(**config))


def tunable(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """LoRA layers of rank 1 for every linear layer and convolution, with values that tell modules apart."""
    layers = {}
    for index, (name, module) in enumerate(network.named_modules()):
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            # The sizes do not matter for names, and the values of a full-size file take 200 MB.
            layers |= {f"{name}.lora_A.weight": torch.full((1, 1), index), f"{name}.lora_B.weight": torch.ones(1, 1)}
    return layers


def stems(names) -> list[str]:
    return sorted({name.partition(".")[0] for name in names})


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_every_layer_of_a_full_size_unet_has_kohyas_and_comfys_name_and_comes_back_through_diffusers(kind):
    network = meta_unet(kind)
    layers = tunable(network)
    modules = sorted({name.partition(".lora_")[0] for name in layers})
    # 794 linear layers and convolutions in SDXL, 282 in 1.x: the count of a wrong architecture would differ.
    assert len(modules) == {"sdxl": 794, "sd15": 282}[kind]
    named = kohya_layers(layers, family=kind, unet=network.config)
    wanted = [sdxl_rule(m) if kind == "sdxl" else f"lora_unet_{m.replace('.', '_')}" for m in modules]
    assert stems(named) == sorted(wanted) and len(set(wanted)) == len(modules)
    pipeline = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    back, alphas = pipeline.lora_state_dict(dict(named), unet_config=network.config)
    found = {}
    for name, value in back.items():
        if ".down." in name or "_lora.down" in name or "lora_A" in name:
            plain = (
                name.removeprefix("unet.")
                .replace(".processor", "")
                .replace("_lora.down", "")
                .replace("to_out", "to_out.0")
            )
            found[plain.replace("to_out.0.0", "to_out.0").replace(".lora.down", "").removesuffix(".weight")] = float(
                value
            )
    assert found == {name.removesuffix(".lora_A.weight"): float(v) for name, v in layers.items() if "lora_A" in name}
    assert set(alphas.values()) <= {1.0}


def test_every_layer_of_full_size_text_encoders_has_kohyas_name():
    first, second = PUBLISHED["sdxl"].text_encoders
    cases = [
        ("sd15", "text_encoder", "lora_te_", meta_text(first, CLIPTextModel)),
        ("sdxl", "text_encoder", "lora_te1_", meta_text(first, CLIPTextModel)),
        ("sdxl", "text_encoder_2", "lora_te2_", meta_text(second, CLIPTextModelWithProjection)),
    ]
    for family, part, prefix, network in cases:
        named = kohya_layers(tunable(network), family=family, unet={}, part=part)
        depth = network.config.num_hidden_layers
        inner = [f"self_attn_{x}" for x in ("k_proj", "v_proj", "q_proj", "out_proj")] + ["mlp_fc1", "mlp_fc2"]
        wanted = [f"{prefix}text_model_encoder_layers_{layer}_{x}" for layer in range(depth) for x in inner]
        wanted += [f"{prefix}text_projection"] if part == "text_encoder_2" else []
        assert stems(named) == sorted(wanted)


def test_a_file_carries_the_hashes_by_which_user_interfaces_find_it(tmp_path):
    layers = {"mid_block.attentions.0.proj_in.lora_A.weight": torch.randn(4, 600, 1, 1)}
    layers["mid_block.attentions.0.proj_in.lora_B.weight"] = torch.randn(600, 4, 1, 1)
    named = kohya_layers(layers, family="sd15", unet={})
    for title in ("a", "another title"):
        write_lora(tmp_path / "f.safetensors", named, {"ss_steps": "3", "modelspec.title": title}, torch.float16)
        data = (tmp_path / "f.safetensors").read_bytes()
        body = data[8 + int.from_bytes(data[:8], "little") :]
        with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
            metadata, shape = file.metadata(), file.get_tensor("lora_unet_mid_block_attentions_0_proj_in.alpha").shape
        # The hash covers the tensors, so that a changed title leaves it as it is.
        assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest() and shape == ()
        assert metadata["modelspec.hash_sha256"] == f"0x{metadata['sshs_model_hash']}"
        assert re.fullmatch("[0-9a-f]{8}", metadata["sshs_legacy_hash"])
