"""Single-file checkpoints and LoRA files of other tools: the same network as the folder, or a refusal."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import ModelError
from acpo_dist.models.checkpoint_files import inspect
from acpo_dist.models.clip_tokenizer import write_clip_tokenizer
from acpo_dist.models.config import TuningConfig
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.lora_files import adapter_layers, diffusers_layers, kohya_layers, write_lora
from tests.helpers import exports
from tests.helpers.exports import ASSETS, FAMILIES, PROMPT, on_latents


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ACPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(kind: str, *overrides: str, trainable: bool = False):
    return FAMILIES[kind].load(load_config(f"toy_{kind}", overrides).model, device="cpu", trainable=trainable)


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """Write the toy as a checkpoint file, once for all tests, which only read it."""

    @functools.cache
    def written(kind: str, **options) -> Path:
        return exports.single_file(kind, tmp_path_factory.mktemp(kind), **options)

    return written


@torch.no_grad()
def answers(family) -> torch.Tensor:
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    predicted = family.predict(noisy, torch.tensor([500, 20]), family.encode([PROMPT, ""]))
    return torch.cat([predicted.flatten(), family.decode(noisy).flatten()])


@functools.cache
def base_answers(kind: str) -> torch.Tensor:
    """Answers of the unchanged toy."""
    return answers(load(kind))


@on_latents
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_single_file_is_the_same_model_as_its_folder(kind, ending, single_file, tmp_path, cache):
    file = single_file(kind)
    if ending == ".ckpt":
        torch.save({"state_dict": load_file(file), "global_step": 7}, tmp_path / "model.ckpt")
        file = tmp_path / "model.ckpt"
    options = (f"model.path={file}", f"model.config=toy-{kind}")
    assert torch.equal(answers(load(kind, *options)), base_answers(kind))
    # Converted once; the second load reads the same folder.
    converted = [path for path in cache.iterdir() if path.is_dir()]
    load(kind, *options)
    assert [path for path in cache.iterdir() if path.is_dir()] == converted and len(converted) == 1


def test_the_prompts_of_a_single_file_are_counted_with_its_tokenizers_and_the_file_is_not_read_as_text(single_file):
    file = single_file("sdxl")
    prompts = ["a red circle", "a red circle on a white background " * 30]
    options = [f"model.path={file}", "model.config=toy-sdxl"]
    counts = FAMILIES["sdxl"].chunk_counts(load_config("toy_sdxl", options).model, prompts)
    assert counts == FAMILIES["sdxl"].chunk_counts(load_config("toy_sdxl").model, prompts) and counts[1] > counts[0]


def test_a_file_in_half_precision_is_widened(single_file):
    file = single_file("sdxl", dtype=torch.float16)
    family = load("sdxl", f"model.path={file}", "model.config=toy-sdxl")
    assert {value.dtype for value in family.network.parameters()} == {torch.float32}
    # The toy's U-Net and VAE are stored in half precision; its encoders are rounded here.
    torch.testing.assert_close(answers(family), base_answers("sdxl"), rtol=0, atol=2e-2)


@on_latents
def test_velocity_and_zero_terminal_snr_are_read_from_the_file(kind, single_file):
    family = load(kind, f"model.path={single_file(kind, velocity=True)}", f"model.config=toy-{kind}")
    assert family.prediction_type == "v_prediction" and float(family.alpha_bars[-1]) == 2.0**-24
    plain = load(kind, f"model.path={single_file(kind)}", f"model.config=toy-{kind}")
    assert plain.prediction_type == "epsilon" and float(plain.alpha_bars[-1]) > 1e-3


def test_a_key_says_what_a_file_predicts_that_does_not_say_so_itself(single_file):
    file = single_file("sd15")
    options = (f"model.path={file}", "model.config=toy-sd15", "model.prediction_type=v_prediction")
    assert load("sd15", *options).prediction_type == "v_prediction"


def names_of_sd2(tmp_path: Path) -> Path:
    file = tmp_path / "sd2.safetensors"
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1, 4, 1, 1)}
    others = ("cond_stage_model.model.positional_embedding", "first_stage_model.quant_conv.bias")
    save_file(tensors | {name: torch.zeros(1) for name in others}, file)
    return file


def test_a_file_of_2_x_must_say_what_it_predicts(tmp_path):
    file = names_of_sd2(tmp_path)
    assert inspect(file).generation == "sd2"
    with pytest.raises(ModelError, match=r"model\.prediction_type=v_prediction"):
        FAMILIES["sd15"].check(load_config("toy_sd15", [f"model.path={file}"]).model)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"lora_unet_a.lora_down.weight": (1, 1)}, r"is a LoRA.*model\.loras"),
        ({"encoder.conv_in.weight": (1, 1)}, r"is a VAE.*model\.vae"),
        ({"model.diffusion_model.joint_blocks.0.x": (1, 1)}, r"Stable Diffusion 3.*model\.type=sd3"),
        ({"model.diffusion_model.double_blocks.0.x": (1, 1)}, "FLUX"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (1, 9, 1, 1)}, "takes 9 channels"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (1, 4, 1, 1)}, "without text encoders"),
        ({"down_blocks.0.x": (1, 1)}, "no checkpoint of Stable Diffusion"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tensors, match, tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "f.safetensors")
    with pytest.raises(ModelError, match=match):
        FAMILIES["sdxl"].check(load_config("toy_sdxl", [f"model.path={tmp_path}/f.safetensors"]).model)


def test_a_pickled_file_that_could_run_code_is_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hook": Path}, tmp_path / "f.ckpt")
    with pytest.raises(ModelError, match="can run code"):
        FAMILIES["sdxl"].check(load_config("toy_sdxl", [f"model.path={tmp_path}/f.ckpt"]).model)


def test_a_file_of_another_family_or_architecture_is_refused_before_it_is_loaded(single_file):
    file = single_file("sdxl")
    with pytest.raises(ModelError, match=r"set model\.type=sdxl"):
        load("sd15", f"model.path={file}")
    with pytest.raises(ModelError, match=r"does not fit the unet.*model\.config"):
        load("sdxl", f"model.path={file}")


def test_a_vae_is_taken_from_a_file_of_its_own(single_file, tmp_path):
    whole = load_file(single_file("sdxl"))
    vae = {name.removeprefix("first_stage_model."): value for name, value in whole.items() if "first_stage" in name}
    save_file(vae, tmp_path / "vae.safetensors")
    save_file({name: value for name, value in whole.items() if "first_stage" not in name}, tmp_path / "no.safetensors")
    assert torch.equal(answers(load("sdxl", f"model.vae={tmp_path}/vae.safetensors")), base_answers("sdxl"))
    with pytest.raises(ModelError, match=r"holds no VAE; set model\.vae"):
        load("sdxl", f"model.path={tmp_path}/no.safetensors", "model.config=toy-sdxl")


def test_the_shipped_tokenizer_gives_clips_tokens(tmp_path):
    write_clip_tokenizer(tmp_path / "clip")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "clip")
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    # Known tokens of CLIP: "a photo of a cat" and "Hello, World!".
    found = [tokenizer(text).input_ids for text in ("a photo of a cat", "Hello, World!")]
    assert found == [[49406, 320, 1125, 539, 320, 2368, 49407], [49406, 3306, 267, 1002, 256, 49407]]
    assert tokenizer("a", padding="max_length", max_length=5).input_ids == [49406, 320, 49407, 49407, 49407]
    # The OpenCLIP encoders are padded with token 0.
    write_clip_tokenizer(tmp_path / "open", pad_token="!")
    padded = AutoTokenizer.from_pretrained(tmp_path / "open")("a", padding="max_length", max_length=5)
    assert padded.input_ids == [49406, 320, 49407, 0, 0]


# LoRA files


@functools.cache
def moved(kind: str, **tuning):
    """A family with moved adapters, and its layers; only to be read."""
    config = load_config(f"toy_{kind}").model.model_copy(update={"tuning": TuningConfig(rank=4, **tuning)})
    family = FAMILIES[kind].load(config, device="cpu", trainable=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainable_tensors(family.network).items():
            change = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(change.abs() if "magnitude" in name else change)
    weights = {name: value.detach() for name, value in trainable_tensors(family.network).items()}
    return family, adapter_layers(weights, config.tuning)


def old_diffusers(layers):
    """Names of diffusers before 0.18: attention processors."""
    named = {}
    for name, value in layers.items():
        name = name.replace(".lora_A.weight", "_lora.down.weight").replace(".lora_B.weight", "_lora.up.weight")
        named[f"unet.{name.replace('to_out.0_lora', 'to_out_lora').replace('.to_', '.processor.to_')}"] = value
    return named


LAYOUTS = {
    "kohya": lambda layers, family: kohya_layers(layers, family=family.config.type, unet=family.network.config),
    "kohya of 1.x": lambda layers, family: kohya_layers(layers, family="sd15", unet={}),
    "diffusers": lambda layers, family: diffusers_layers(layers),
    "diffusers 0.17": lambda layers, family: old_diffusers(layers),
    "peft": lambda layers, family: {f"base_model.model.{name}": value for name, value in layers.items()},
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_lora_of_any_layout_is_merged_into_the_base_and_continued(layout, tmp_path):
    tuned, layers = moved("sdxl")
    write_lora(tmp_path / "l.safetensors", LAYOUTS[layout](layers, tuned), {}, torch.float32)
    merged = load("sdxl", f"model.loras=[{{path: {tmp_path}/l.safetensors}}]")
    torch.testing.assert_close(answers(merged), answers(tuned), rtol=0, atol=1e-5)
    continued = load("sdxl", f"model.tuning.init={tmp_path}/l.safetensors", trainable=True)
    torch.testing.assert_close(answers(continued), answers(tuned), rtol=0, atol=1e-5)
    weights = {name: value.detach() for name, value in trainable_tensors(continued.network).items()}
    again = adapter_layers(weights, continued.config.tuning)
    assert again.keys() == layers.keys()
    assert all(torch.allclose(again[name], layers[name], atol=1e-6) for name in layers)


def test_the_anchor_of_a_continued_lora_is_the_start_or_the_base_as_a_key_says(tmp_path):
    tuned, layers = moved("sdxl")
    file = tmp_path / "l.safetensors"
    write_lora(file, diffusers_layers(layers), {}, torch.float32)
    wanted = {"init": answers(tuned), "base": base_answers("sdxl")}
    for anchor, answer in wanted.items():
        family = load("sdxl", f"model.tuning.init={file}", f"model.tuning.anchor={anchor}", trainable=True)
        with torch.no_grad():
            for parameter in trainable_tensors(family.network).values():
                parameter.add_(0.1)
        with family.anchored():
            torch.testing.assert_close(answers(family), answer, rtol=0, atol=1e-5)


def test_scale_and_alpha_of_a_lora_count(tmp_path):
    base, (tuned, layers) = load("sdxl"), moved("sdxl")
    named = kohya_layers(layers, family="sdxl", unet=tuned.network.config)
    halved = {name: value / 2 if name.endswith(".alpha") else value for name, value in named.items()}
    write_lora(tmp_path / "l.safetensors", halved, {}, torch.float32)
    # Half the alpha at twice the scale.
    merged = load("sdxl", f"model.loras=[{{path: {tmp_path}/l.safetensors, scale: 2}}]")
    torch.testing.assert_close(answers(merged), answers(tuned), rtol=0, atol=1e-5)
    nothing = load("sdxl", f"model.loras=[{{path: {tmp_path}/l.safetensors, scale: 0}}]")
    assert torch.equal(answers(nothing), answers(base))


def test_layers_of_text_encoders_are_merged_and_cannot_be_continued(tmp_path):
    module = "encoder.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    layers = {f"{module}.lora_{ab}.weight": torch.randn(shape, generator=generator)
              for ab, shape in (("A", (4, 32)), ("B", (32, 4)))}  # fmt: skip
    file = tmp_path / "t.safetensors"
    save_file(kohya_layers(layers, family="sdxl", unet={}, part="text_encoder_2"), file)
    base, merged = load("sdxl"), load("sdxl", f"model.loras=[{{path: {file}}}]")
    found, wanted = (family.encode([PROMPT]).tensors["prompt_embeds"] for family in (merged, base))
    # The first half is the first encoder's.
    assert torch.equal(found[..., :32], wanted[..., :32]) and not torch.equal(found[..., 32:], wanted[..., 32:])
    with pytest.raises(ModelError, match=r"text encoders.*model\.loras"):
        load("sdxl", f"model.tuning.init={file}")


@pytest.mark.parametrize(
    "tuning",
    [
        {"use_dora": True}, {"use_rslora": True, "alpha": 3.0}, {"init_weights": "gaussian"},
        {"targets": ("conv1", "conv2", "conv_shortcut", "proj_in", "to_q")},
        {"use_dora": True, "targets": ("conv1", "to_q")},
    ],
    ids=str,
)  # fmt: skip
def test_every_kind_of_lora_is_exported_and_read_back_as_it_was_trained(tuning, tmp_path):
    tuned, layers = moved("sdxl", **tuning)
    named = kohya_layers(layers, family="sdxl", unet=tuned.network.config)
    write_lora(tmp_path / "l.safetensors", named, {}, torch.float32)
    merged = load("sdxl", f"model.loras=[{{path: {tmp_path}/l.safetensors}}]")
    torch.testing.assert_close(answers(merged), answers(tuned), rtol=0, atol=2e-5)
    # At the start the adapters change nothing, whatever their kind.
    config = tuned.config
    start = FAMILIES["sdxl"].load(config, device="cpu", trainable=True)
    torch.testing.assert_close(answers(start), base_answers("sdxl"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["lora_unet_nowhere.lokr_w1", "lora_unet_nowhere.lokr_w2"], "another architecture"),
        (["lora_unet_a.oft_blocks"], "OFT"),
        (["lora_unet_a.lora_mid.weight", "lora_unet_a.lora_down.weight"], "Tucker"),
        (["weight"], "no LoRA layers"),
        (["lora_unet_nowhere.lora_down.weight", "lora_unet_nowhere.lora_up.weight"], "another architecture"),
    ],
)
def test_other_adapters_are_refused_by_name(names, kind, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(1, 1) for name in names}, file)
    for key in (f"model.loras=[{{path: {file}}}]", f"model.tuning.init={file}"):
        with pytest.raises(ModelError, match=kind):
            load("sdxl", key)


def test_merged_loras_are_part_of_a_converted_variant_folder(tmp_path):
    folder = Path(shutil.copytree(ASSETS / "toy-sdxl", tmp_path / "half"))
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    tuned, layers = moved("sdxl")
    write_lora(tmp_path / "l.safetensors", diffusers_layers(layers), {}, torch.float32)
    options = (f"model.path={folder}", "model.variant=fp16", f"model.loras=[{{path: {tmp_path}/l.safetensors}}]")
    torch.testing.assert_close(answers(load("sdxl", *options)), answers(tuned), rtol=0, atol=1e-5)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
