"""LoKr and LoHa files of LyCORIS and peft: merged into the base model as peft merges them, or refused by their name."""

import copy
import functools
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from safetensors.torch import save_file

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import ModelError
from acpo_dist.models.lora_files import check_lora_file
from acpo_dist.models.lora_reading import module_shapes, read_lora
from acpo_dist.models.module_names import kohya_name
from acpo_dist.models.pipeline_files import merged
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.models.tensor_files import Entry
from tests.helpers.exports import ASSETS

KINDS = {
    "LoKr": LoKrConfig(r=2, alpha=3),
    "LoKr of two products": LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=8),
    "LoKr of whole matrices": LoKrConfig(r=64, alpha=64),
    "LoKr with Tucker": LoKrConfig(r=2, alpha=9, use_effective_conv2d=True),
    "LoHa": LoHaConfig(r=2, alpha=3),
    "LoHa with Tucker": LoHaConfig(r=3, alpha=900, use_effective_conv2d=True),
}  # fmt: skip


@functools.cache
def toy_unet() -> UNet2DConditionModel:
    """The toy's U-Net; only to be read."""
    return UNet2DConditionModel.from_pretrained(ASSETS / "toy-sdxl" / "unet")


def entries_of(unet) -> dict[str, Entry]:
    return {name: Entry.of(value.detach()) for name, value in unet.named_parameters()}


@functools.cache
def adapted(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(parts of the layers by peft's names, weights with the layers merged by peft)."""
    config, unet = KINDS[kind], copy.deepcopy(toy_unet())
    config.target_modules, config.init_weights = ["to_q", "conv1", "proj_in", "conv_shortcut"], False
    with torch.random.fork_rng():
        torch.manual_seed(2)
        inject_adapter_in_model(config, unet)
    parts, weights = {}, {}
    for name, module in unet.named_modules():
        if isinstance(module, LoKrLayer | LoHaLayer):
            for part, value in module.named_parameters():
                if part.endswith(".default"):
                    parts[f"{name}.{part.removesuffix('.default')}"] = value.detach().clone()
            module.merge()
            weights[name] = unet.get_parameter(f"{name}.base_layer.weight").detach()
    return parts, weights


def write(folder, kind: str, layout: str, parts):
    """A file of peft beside its configuration, or of LyCORIS with an alpha per module and kohya's names."""
    file = folder / "adapter_model.safetensors"
    if layout == "peft":
        save_file({f"base_model.model.{name}": value for name, value in parts.items()}, file)
        config = {"peft_type": kind[:4].upper(), "r": KINDS[kind].r, "alpha": KINDS[kind].alpha, "rank_pattern": {}}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return file
    unet, named = toy_unet().config, {}
    for name, value in parts.items():
        module, _, part = name.rpartition(".")
        stem = kohya_name("unet", module, family="sdxl", unet=unet)
        named |= {f"{stem}.{part}": value, f"{stem}.alpha": torch.tensor(float(KINDS[kind].alpha))}
    save_file(named, file)
    return file


@pytest.mark.parametrize("layout", ["peft", "LyCORIS"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_lokr_and_loha_layers_are_merged_as_peft_merges_them(kind, layout, tmp_path):
    parts, wanted = adapted(kind)
    file, base = write(tmp_path, kind, layout, parts), entries_of(toy_unet())
    layers = read_lora(file, {"unet": module_shapes(base)}, toy_unet().config, key="model.loras")["unet"]
    found, half = merged(base, layers), merged(base, layers, 0.5)
    for module, weight in wanted.items():
        plain, name = base[f"{module}.weight"].read(), f"{module}.weight"
        torch.testing.assert_close(found[name].read(), weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(half[name].read(), (plain + weight) / 2, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(weight, plain, atol=1e-4)
    assert all(found[name] is entry for name, entry in base.items() if name.removesuffix(".weight") not in wanted)


def test_a_lokr_in_model_loras_changes_the_base_model_and_cannot_be_continued_or_scaled(tmp_path, monkeypatch):
    monkeypatch.setenv("ACPO_CACHE", str(tmp_path / "cache"))
    parts, wanted = adapted("LoKr")
    file = write(tmp_path, "LoKr", "LyCORIS", parts)
    config = load_config("toy_sdxl", [f"model.loras=[{{path: {file}}}]"]).model
    network = SdxlFamily.load(config, device="cpu", trainable=False).network
    held = {name.replace(".base_layer", ""): value for name, value in network.named_parameters()}
    for module, weight in wanted.items():
        torch.testing.assert_close(held[f"{module}.weight"], weight, rtol=1e-5, atol=1e-6)
    config = load_config("toy_sdxl", [f"model.tuning.init={file}"]).model
    with pytest.raises(ModelError, match=r"LoKr.*model\.loras"):
        SdxlFamily.load(config, device="cpu", trainable=True)
    with pytest.raises(ModelError, match=r"LoKr.*model\.loras"):
        check_lora_file(file, toy_unet())


@pytest.mark.parametrize(("kind", "part"), [("LoKr", "lokr_w2_a"), ("LoHa", "hada_w2_b")])
def test_incomplete_and_foreign_lokr_and_loha_layers_are_refused_by_name(kind, part, tmp_path):
    parts, _ = adapted(kind)
    name = next(name for name in parts if name.endswith(part))
    shapes, config = {"unet": module_shapes(entries_of(toy_unet()))}, toy_unet().config
    cases = {
        "only a part": {key: value for key, value in parts.items() if key != name},
        "do not fit together": parts | {name: torch.zeros(7, 5)},
        "another architecture": parts | {key: torch.zeros(64, 8) if key.endswith("_a") else torch.zeros(8, 64)
                                         for key in parts if key.startswith(name.removesuffix(part))},
    }  # fmt: skip
    for said, changed in cases.items():
        file = write(tmp_path, kind, "peft", changed)
        with pytest.raises(ModelError, match=said) as caught:
            read_lora(file, shapes, config, key="model.loras")
        assert kind in str(caught.value) and name.removesuffix(f".{part}") in str(caught.value)
