"""LoRA scale at inference: the base model's image at 0, the tuned model's at 1, and increasing drift in between."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from acpo_dist.analysis.release.export import export
from acpo_dist.config.load import load_config
from acpo_dist.core.errors import ModelError, UsageError
from acpo_dist.core.weights import make_bundle
from acpo_dist.models.lora_files import adapter_layers, kohya_layers
from acpo_dist.models.lora_scale import LoraScale, Range, parse_grid, parse_range
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.training.export import export_run
from acpo_dist.training.run_folder import RunFolder, read_run_config
from acpo_dist.workers.learner.checkpoint import CheckpointStore
from tests.helpers.exports import (
    FAMILIES,
    PROMPT,
    base,
    command,
    finished_run,
    image,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """One run per family."""
    return {kind: finished_run(kind, tmp_path_factory.mktemp("runs") / kind) for kind in FAMILIES}


@pytest.fixture(scope="module")
def lora(runs, tmp_path_factory) -> Path:
    """The LoRA of the SDXL run in diffusers' layout."""
    config = load_config(runs["sdxl"] / "resolved.yaml")
    weights = load_file(runs["sdxl"] / "checkpoints" / "000003" / "learner" / "policy.safetensors")
    folder = tmp_path_factory.mktemp("lora")
    SdxlFamily.pipeline.save_lora_weights(folder, unet_lora_layers=adapter_layers(weights, config.model.tuning))
    return folder


def test_scale_0_draws_the_image_of_the_base_bit_for_bit_and_scale_1_that_of_the_tuned_model(lora):
    untouched = image(base("sdxl"))
    plain = base("sdxl")
    plain.load_lora_weights(lora)
    with_lora_scale = base("sdxl")
    lora_scale = LoraScale(with_lora_scale, lora)
    lora_scale.set(0.0)
    assert torch.equal(image(with_lora_scale), untouched)
    lora_scale.set(1.0)
    assert torch.equal(image(with_lora_scale), image(plain))
    lora_scale.set(0.0)
    assert torch.equal(image(with_lora_scale), untouched)


def test_drift_from_the_base_grows_with_the_scale(lora):
    pipeline = base("sdxl")
    noisy = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states, _, pooled, _ = pipeline.encode_prompt([PROMPT] * 4, do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]] * 4)}

    def predict():
        with torch.no_grad():
            return pipeline.unet(noisy, torch.tensor(200), encoder_hidden_states=states, added_cond_kwargs=added).sample

    wanted = predict()
    lora_scale, drifts = LoraScale(pipeline, lora), []
    for scale in (0.0, 0.25, 0.5, 0.75, 1.0):
        lora_scale.set(scale)
        drifts.append(float((predict() - wanted).square().mean()))
    assert drifts[0] == 0 and all(later > earlier for earlier, later in pairwise(drifts))


def test_a_range_of_timesteps_has_its_own_scale(lora):
    pipeline = base("sdxl")
    lora_scale = LoraScale(pipeline, lora)
    lora_scale.set(1.0, [Range(low=0, high=1000, scale=0.0)])
    assert torch.equal(image(pipeline), image(base("sdxl")))
    lora_scale.set(0.0, [parse_range("300:0:1")])
    assert [lora_scale.at(timestep) for timestep in (301, 300, 150, 0)] == [0, 1, 1, 1]
    late_only = image(pipeline)
    assert not torch.equal(late_only, image(base("sdxl")))
    lora_scale.set(1.0)
    assert not torch.equal(late_only, image(pipeline))


def test_the_kohya_layout_draws_the_same_image_as_the_diffusers_layout(runs, lora, tmp_path, monkeypatch, capsys):
    _, report, _ = command(monkeypatch, capsys, "export", runs["sdxl"], "--out", tmp_path / "k")
    images = []
    for file in (lora, Path(report["file"])):
        pipeline = base("sdxl")
        LoraScale(pipeline, file).set(0.5)
        images.append(image(pipeline))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-4)


def test_a_lora_of_another_architecture_is_refused_with_both_widths(tmp_path):
    layers = {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.zeros(4, 768)}
    save_file(kohya_layers(layers, family="sd15", unet={}), tmp_path / "sd15.safetensors")
    with pytest.raises(ModelError, match=r"width 768 \(Stable Diffusion 1\.x\), and this one takes 64"):
        LoraScale(base("sdxl"), tmp_path / "sd15.safetensors")


def test_a_lora_with_unknown_modules_is_refused(tmp_path):
    stem = "unet.down_blocks.7.attentions.0.proj_in"
    save_file(
        {f"{stem}.lora_A.weight": torch.zeros(4, 72), f"{stem}.lora_B.weight": torch.zeros(72, 4)},
        tmp_path / "deeper.safetensors",
    )
    with pytest.raises(ModelError, match="another architecture"):
        LoraScale(base("sdxl"), tmp_path / "deeper.safetensors")


def test_files_without_low_rank_layers_are_refused(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name, message in (("broken", "cannot be read"), ("other", "no LoRA layers"), ("absent", "found nothing")):
        with pytest.raises(ModelError, match=message):
            LoraScale(base("sdxl"), tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("text", ["a:b:c", "0:1", "0:300:1.5"])
def test_malformed_ranges_are_refused(text):
    with pytest.raises(UsageError, match="--lora-scale-range"):
        parse_range(text)


def test_the_command_draws_a_grid_over_scales(lora, tmp_path, monkeypatch, capsys):
    assert parse_grid("0,0.5,1") == (0.0, 0.5, 1.0)
    code, report, err = command(
        monkeypatch, capsys, "generate", "toy-sdxl", "--prompt", PROMPT, "--lora", lora, "--grid", "0,0.5,1",
        "--steps", 3, "--out", tmp_path / "grid",
    )  # fmt: skip
    assert code == 0, err
    assert [row["lora_scale"] for row in report["images"]] == [0.0, 0.5, 1.0]
    assert len({Path(row["path"]).read_bytes() for row in report["images"]}) == 3
    _, plain, _ = command(
        monkeypatch, capsys, "generate", "toy-sdxl", "--prompt", PROMPT, "--steps", 3, "--out", tmp_path / "base"
    )
    # Scale 0 writes the same file, byte for byte, as the command without a LoRA.
    assert Path(plain["images"][0]["path"]).read_bytes() == Path(report["images"][0]["path"]).read_bytes()


def test_a_scale_without_a_lora_needs_a_run_that_exported_one(tmp_path, monkeypatch, capsys):
    asked = ["generate", "toy-sdxl", "--prompt", PROMPT, "--lora-scale", 0.5, "--out", tmp_path]
    code, _, err = command(monkeypatch, capsys, *asked)
    assert code == 2 and "--lora FILE" in err


def draw(monkeypatch, capsys, out: Path, *asked) -> list[Image.Image]:
    """Images of `acpo generate` in three steps."""
    arguments = ["generate", *asked, "--prompt", PROMPT, "--steps", 3, "--out", out]
    code, report, err = command(monkeypatch, capsys, *arguments)
    assert code == 0, err
    return [Image.open(row["path"]) for row in report["images"]]


def exported(run: Path, *, scale: float = 1) -> None:
    """Export a run as it does when it ends; the weights are multiplied by `scale`."""
    config = read_run_config(run)
    store = CheckpointStore(run / "checkpoints", keep=2)
    checkpoint = store.open(3)
    scaled = make_bundle(3, {name: scale * value for name, value in checkpoint.bundle().tensors.items()})
    export_run(config, RunFolder(root=run, checkpoints=store), scaled, iteration=3, checkpoint=checkpoint)


def test_a_given_lora_applies_to_the_base_of_the_run_and_not_to_its_export(runs, lora, tmp_path, monkeypatch, capsys):
    [wanted] = draw(monkeypatch, capsys, tmp_path / "base", "toy-sdxl", "--lora", lora)
    run = Path(shutil.copytree(runs["sdxl"], tmp_path / "run"))
    exported(run, scale=3)
    [found] = draw(monkeypatch, capsys, tmp_path / "run-and-lora", run, "--lora", lora)
    assert found.tobytes() == wanted.tobytes()


def test_the_base_of_a_run_is_opened_as_the_run_opened_it(tmp_path, monkeypatch, capsys):
    # As `hf download --include "*.fp16.safetensors"` leaves Stable Diffusion 1.5: half of the files, and no checker.
    folder = tmp_path / "sd15"
    base("sd15").save_pretrained(folder, variant="fp16")
    index = json.loads((folder / "model_index.json").read_text())
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps(index | checker))
    run = finished_run("sd15", tmp_path / "run", f"model.path={folder}", "model.variant=fp16")
    exported(run)
    images = draw(monkeypatch, capsys, tmp_path / "grid", run, "--grid", "0,1")
    [plain] = draw(monkeypatch, capsys, tmp_path / "plain", "toy-sd15")
    assert images[0].tobytes() == plain.tobytes() != images[1].tobytes()


def test_a_run_draws_with_its_own_size_and_negative_prompt(tmp_path, monkeypatch, capsys):
    own = ["model.image_size=48", f"model.negative_prompt={PROMPT}"]
    run = finished_run("sdxl", tmp_path / "run", *own)
    exported(run)
    card = export(run, tmp_path / "merged", layout="merged").card.read_text()
    assert f'height=48, width=48, negative_prompt="{PROMPT}"' in card and "| image size | 48x48 |" in card
    [found] = draw(monkeypatch, capsys, tmp_path / "own", run)
    asked = ["--size", 48, "--negative-prompt", PROMPT]
    [wanted] = draw(
        monkeypatch,
        capsys,
        tmp_path / "asked",
        "toy-sdxl",
        "--lora",
        next((run / "export").glob("*.safetensors")),
        *asked,
    )
    assert found.size == (48, 48) and found.tobytes() == wanted.tobytes()
    assert draw(monkeypatch, capsys, tmp_path / "small", run, "--size", 32)[0].size == (32, 32)
    code, _, err = command(monkeypatch, capsys, "generate", run, "--prompt", PROMPT, "--size", 30, "--out", tmp_path)
    assert code == 2 and "multiples of 8, found 30x30" in err


@pytest.fixture(scope="module")
def text_lora(tmp_path_factory) -> Path:
    """A LoRA of U-Net and both text encoders, as diffusers' own training scripts write it."""
    pipeline = base("sdxl")
    torch.manual_seed(0)
    parts = {"unet": ["to_q", "to_k"], "text_encoder": ["q_proj", "v_proj"], "text_encoder_2": ["q_proj", "v_proj"]}
    layers = {}
    for part, targets in parts.items():
        network = getattr(pipeline, part)
        network.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets))
        state = get_peft_model_state_dict(network)
        layers[f"{part}_lora_layers"] = state if part == "unet" else convert_state_dict_to_diffusers(state)
    folder = tmp_path_factory.mktemp("text-lora")
    pipeline.save_lora_weights(folder, **layers)
    return folder


def test_the_scale_applies_to_text_encoders_that_the_file_adapts(text_lora):
    untouched, plain, with_lora_scale = base("sdxl"), base("sdxl"), base("sdxl")
    plain.load_lora_weights(text_lora)
    lora_scale, wanted = LoraScale(with_lora_scale, text_lora), image(untouched)
    lora_scale.set(0.0)
    assert torch.equal(image(with_lora_scale), wanted)
    lora_scale.set(1.0)
    assert torch.equal(image(with_lora_scale), image(plain))
    plain.set_adapters(plain.get_active_adapters(), 0.5)
    lora_scale.set(0.5)
    torch.testing.assert_close(image(with_lora_scale), image(plain), rtol=0, atol=1e-5)


def test_a_range_of_timesteps_is_refused_for_a_file_that_adapts_text_encoders(text_lora):
    lora_scale = LoraScale(base("sdxl"), text_lora)
    with pytest.raises(UsageError, match="--lora-scale-range"):
        lora_scale.set(1.0, [Range(low=0, high=300, scale=0.5)])
