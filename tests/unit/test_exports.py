"""What is exported opens in plain diffusers with the same picture; the anchor's knob goes from base to tuned."""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import acpo_dist.toy
from acpo_dist.cli import main
from acpo_dist.config.load import dump, load_config
from acpo_dist.core.errors import ModelError, UsageError
from acpo_dist.core.types import PromptGroup, SamplePlan
from acpo_dist.diffusion.trajectory import explicit_trajectory
from acpo_dist.exports import export, kohya_base
from acpo_dist.learner.checkpoint import CheckpointStore
from acpo_dist.learner.engine import TorchEngine
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.lora_files import adapter_layers, kohya_layers, original_name
from acpo_dist.models.sd15 import Sd15Family
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.retiming.artefact import trajectory_to_mapping
from acpo_dist.sources import open_rollouts
from acpo_dist.strength import AnchorKnob, Range, parse_grid, parse_range

ASSETS = Path(acpo_dist.toy.__file__).parent / "assets"
PROMPT = "a red circle on a white background"
FAMILIES = {"sdxl": SdxlFamily, "sd15": Sd15Family}
on_latents = pytest.mark.parametrize("kind", list(FAMILIES))


def tuned(config):
    """The family with every trainable weight moved."""
    family = FAMILIES[config.model.type].load(config.model, device="cpu", trainable=True)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_tensors(family.network).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return family


def finished_run(kind: str, root: Path, *overrides: str) -> Path:
    """A run folder with one checkpoint of moved weights, and averages that are halfway there."""
    config = load_config(f"toy_{kind}", [f"run.dir={root}", "model.tuning.alpha=24", *overrides])
    family = tuned(config)
    store = CheckpointStore(root / "checkpoints", keep=2)
    partial = store.prepare(3)
    weights = TorchEngine(family.network, config.learner, accumulation=1).weights()
    save_file(weights, partial / "learner" / "policy.safetensors")
    save_file({name: value / 2 for name, value in weights.items()}, partial / "learner" / "ema.safetensors")
    # Nothing like an even spacing.
    steep = explicit_trajectory(family.alpha_bars, [999, 700, 300, 60])
    state = {"version": 3, "trajectory": trajectory_to_mapping(steep, family.alpha_bars.numpy())}
    store.commit(partial, 3, state)
    (root / "resolved.yaml").write_text(dump(config))
    rows = [{"iteration": i, "judge/strided_judge/mean": 0.1 * i, "drift/rms": 0.01 * i} for i in range(4)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """One run per family."""
    return {kind: finished_run(kind, tmp_path_factory.mktemp("runs") / kind) for kind in FAMILIES}


def command(monkeypatch, capsys, *arguments) -> tuple[int, dict, str]:
    monkeypatch.setattr(sys, "argv", ["acpo", *map(str, arguments), "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    out, err = capsys.readouterr()
    # In process the libraries' own lines come before the answer.
    return done.value.code, json.loads(out.splitlines()[-1]) if out else {}, err


def base(kind: str):
    pipeline = DiffusionPipeline.from_pretrained(ASSETS / f"toy-{kind}", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def picture(pipeline, **options) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    asked = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "pt", **options}
    return pipeline(PROMPT, generator=generator, **asked).images


@on_latents
@pytest.mark.parametrize("layout", ["diffusers-lora", "kohya"])
def test_an_exported_lora_gives_plain_diffusers_the_merged_pipelines_picture(
    runs, kind, layout, tmp_path, monkeypatch, capsys
):
    asked = ["export", runs[kind], "--out", tmp_path / "lora", "--format", layout]
    code, report, err = command(monkeypatch, capsys, *asked)
    assert code == 0, err
    command(monkeypatch, capsys, "export", runs[kind], "--out", tmp_path / "merged", "--format", "merged")
    plain = base(kind)
    untouched = picture(plain)
    plain.load_lora_weights(tmp_path / "lora", weight_name=Path(report["file"]).name)
    wanted = picture(DiffusionPipeline.from_pretrained(tmp_path / "merged"))
    assert float((wanted - untouched).abs().max()) > 0.05
    # Two float32 sums in another order, through four guided steps and the decoder.
    torch.testing.assert_close(picture(plain), wanted, rtol=0, atol=2e-4)


@on_latents
def test_the_exported_schedule_makes_plain_diffusers_draw_the_rollouts_picture(
    runs, kind, tmp_path, monkeypatch, capsys
):
    asked = ["export", runs[kind], "--out", tmp_path / "merged", "--format", "merged"]
    _, report, _ = command(monkeypatch, capsys, *asked)
    levels = json.loads(Path(report["schedule"]).read_text())["diffusers"]["EulerDiscreteScheduler"]
    plain = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    plain.scheduler = EulerDiscreteScheduler.from_config(plain.scheduler.config, timestep_spacing="leading")
    config = load_config(runs[kind] / "resolved.yaml")
    pool = open_rollouts(config, runs[kind])
    assert pool.trajectory().timesteps == (999.0, 700.0, 300.0, 60.0)
    plan = SamplePlan(sample_id="a", prompt_id=0, prompt=PROMPT, seed=3)
    [handle] = pool.generate([PromptGroup(prompt_id=0, prompt=PROMPT, samples=(plan,))])
    noise = torch.randn(handle.payload.latents_BCHW.shape, generator=torch.Generator().manual_seed(3))
    guidance = config.sampler.guidance_scale
    with torch.no_grad():
        drawn = plain(PROMPT, latents=noise, guidance_scale=guidance, output_type="pt", **levels).images
    wanted = handle.payload.images_BCHW.float() / 255
    # Ours is rounded to 8 bits.
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1.01 / 255)
    card = Path(report["card"]).read_text()
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    assert "EulerDiscreteScheduler" in card and "schedule.json" in card


def test_averaged_weights_are_exported_when_asked_for(runs, tmp_path, monkeypatch, capsys):
    for weights in ("raw", "ema"):
        command(monkeypatch, capsys, "export", runs["sdxl"], "--out", tmp_path / weights, "--weights", weights)
    raw, ema = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("raw", "ema"))
    assert all(torch.allclose(ema[name], raw[name] / 2) for name in raw)


def test_a_checkpoint_is_exported_with_a_card_of_where_it_comes_from(runs, tmp_path, monkeypatch, capsys):
    checkpoint = runs["sdxl"] / "checkpoints" / "000003"
    _, report, _ = command(monkeypatch, capsys, "export", checkpoint, "--out", tmp_path / "out")
    card = Path(report["card"]).read_text()
    assert report["iteration"] == 3 and report["sha256"] in card
    # Figures of the iteration that made these weights, not of a later one.
    assert "| judge/strided_judge/mean | 0.2 |" in card and "| drift/rms | 0.02 |" in card
    for words in ("toy-sdxl", "two_stream", "strided_judge", "Licence", "load_lora_weights", "3 of 60"):
        assert words in card
    assert str(runs["sdxl"]) not in card


def test_kohyas_file_names_every_module_as_in_sdxls_original_code(runs, tmp_path, monkeypatch, capsys):
    _, report, _ = command(monkeypatch, capsys, "export", runs["sdxl"], "--out", tmp_path / "k", "--format", "kohya")
    with safe_open(report["file"], framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert {name.split(".")[0].split("_")[2] for name in names} <= {"input", "middle", "output"}
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and metadata["ss_network_dim"] == "16"
    assert all(name.endswith((".lora_down.weight", ".lora_up.weight", ".alpha")) for name in names)


@pytest.mark.parametrize(
    ("module", "original"),
    [
        # Known pairs of SDXL base, which has two layers per block.
        ("down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2", "input_blocks.4.1.transformer_blocks.0.ff.net.2"),
        ("down_blocks.2.resnets.1.conv1", "input_blocks.8.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.attentions.2.proj_out", "output_blocks.2.1.proj_out"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.2.resnets.0.conv_shortcut", "output_blocks.6.0.skip_connection"),
    ],
)
def test_modules_have_their_original_names(module, original):
    assert original_name(module, layers_per_block=2) == original


def test_full_tuning_has_no_lora_and_a_taken_folder_is_refused(runs, tmp_path, monkeypatch, capsys):
    run = finished_run("sdxl", tmp_path / "full", "model.tuning.method=full")
    code, _, err = command(monkeypatch, capsys, "export", run, "--out", tmp_path / "a")
    assert code == 2 and "take `merged`" in err
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    code, _, err = command(monkeypatch, capsys, "export", runs["sdxl"], "--out", tmp_path / "taken")
    assert code == 2 and "is not empty" in err
    code, _, err = command(monkeypatch, capsys, "export", runs["sdxl"], "--out", tmp_path / "b", "--format", "onnx")
    assert code == 2 and "unknown --format onnx" in err


def unet_of(folder: Path) -> dict[str, torch.Tensor]:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()


def test_weights_tuned_whole_are_exported_as_the_checkpoint_holds_them_where_rollouts_run_in_bfloat16(
    tmp_path, monkeypatch, capsys
):
    run = finished_run("sdxl", tmp_path / "run", "model.tuning.method=full", "model.dtype=bfloat16")
    code, _, err = command(monkeypatch, capsys, "export", run, "--out", tmp_path / "out", "--format", "merged")
    assert code == 0, err
    weights = load_file(run / "checkpoints" / "000003" / "learner" / "policy.safetensors")
    found = unet_of(tmp_path / "out")
    assert set(found) == set(weights) and all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_merged_lora_lies_on_the_unrounded_base_where_rollouts_run_in_bfloat16(tmp_path, monkeypatch, capsys):
    run = finished_run("sdxl", tmp_path / "run", "model.dtype=bfloat16", "model.tuning.targets=[to_q]")
    code, _, err = command(monkeypatch, capsys, "export", run, "--out", tmp_path / "out", "--format", "merged")
    assert code == 0, err
    untouched, found = unet_of(ASSETS / "toy-sdxl"), unet_of(tmp_path / "out")
    adapters = load_file(run / "checkpoints" / "000003" / "learner" / "policy.safetensors")
    for name, value in untouched.items():
        module = name.removesuffix(".weight")
        update = torch.zeros(())
        if module.endswith("to_q"):
            up, down = (adapters[f"{module}.lora_{part}.default.weight"] for part in "BA")
            update = 24 / 16 * up @ down
        # One addition in float32; bfloat16 would be off by 4e-3 of the weight.
        torch.testing.assert_close(found[name], value + update, rtol=1e-6, atol=1e-6 if update.ndim else 0)


@pytest.fixture
def taken_back(runs, tmp_path) -> Path:
    """A run whose guard went back from iteration 5 to the checkpoint of iteration 3."""
    root = Path(shutil.copytree(runs["sdxl"], tmp_path / "run"))
    store = CheckpointStore(root / "checkpoints", keep=9)
    partial, kept = store.prepare(5), store.open(3)
    for name in ("policy", "ema"):
        moved = {key: value + 1 for key, value in load_file(kept.learner_folder / f"{name}.safetensors").items()}
        save_file(moved, partial / "learner" / f"{name}.safetensors")
    store.commit(partial, 5, {"version": 5, "trajectory": kept.state["trajectory"]})
    rolled_back(root, best=3)
    return root


def rolled_back(root: Path, *, best: int) -> None:
    reason = {"rule": "judge_below_base/strided_judge", "level": "stop", "value": 2.0, "warn": 0.5, "stop": 1.0}
    record = {"iteration": 4, "action": "roll_back", "best_iteration": best, "reasons": [reason]}
    (root / "guard.jsonl").write_text(json.dumps(record) + "\n")


def test_weights_that_the_guard_took_back_are_not_exported_unless_they_are_named(
    taken_back, tmp_path, monkeypatch, capsys
):
    code, report, err = command(monkeypatch, capsys, "export", taken_back, "--out", tmp_path / "best")
    assert code == 0 and report["iteration"] == 3, err
    said = "after iteration 5 (roll_back): judge `strided_judge` is 2.00 base standard deviations below the base model"
    assert said in report["guard"] and said in Path(report["card"]).read_text()
    named = taken_back / "checkpoints" / "000005"
    _, report, _ = command(monkeypatch, capsys, "export", named, "--out", tmp_path / "last")
    assert report["iteration"] == 5 and "iteration 5 is not: it went to 3" in Path(report["card"]).read_text()
    # A run that went on from there did not end there.
    (taken_back / "checkpoints" / "000005").rename(taken_back / "checkpoints" / "000006")
    _, report, _ = command(monkeypatch, capsys, "export", taken_back, "--out", tmp_path / "further")
    assert report["guard"] is None


def test_a_roll_back_to_a_base_model_that_was_never_saved_says_so(taken_back, tmp_path, monkeypatch, capsys):
    rolled_back(taken_back, best=0)
    code, _, err = command(monkeypatch, capsys, "export", taken_back, "--out", tmp_path / "out")
    assert code == 2 and "taken back to the base model, of which there is no checkpoint" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_kohyas_file_says_which_stable_diffusion_it_belongs_to_and_what_that_predicts(tmp_path):
    folder = Path(shutil.copytree(ASSETS / "toy-sd15", tmp_path / "v"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    first, second = (
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.zeros(4, width)}
        for width in (768, 1024)
    )
    plain, velocity = load_config("toy_sd15"), load_config("toy_sd15", [f"model.path={folder}"])
    # As kohya's own scripts compose it: `sd`, the generation, `_v` for velocity.
    found = [kohya_base(*asked) for asked in ((plain, first), (plain, second), (velocity, second))]
    assert [said["ss_base_model_version"] for said in found] == ["sd_v1", "sd_v2", "sd_v2_v"]
    assert [said["ss_v2"] for said in found] == ["False", "True", "True"]
    assert [said["modelspec.prediction_type"] for said in found] == ["epsilon", "epsilon", "v"]


# The anchor's knob


@pytest.fixture(scope="module")
def lora(runs, tmp_path_factory) -> Path:
    """The LoRA of the SDXL run in diffusers' layout."""
    config = load_config(runs["sdxl"] / "resolved.yaml")
    weights = load_file(runs["sdxl"] / "checkpoints" / "000003" / "learner" / "policy.safetensors")
    folder = tmp_path_factory.mktemp("lora")
    SdxlFamily.pipeline.save_lora_weights(folder, unet_lora_layers=adapter_layers(weights, config.model.tuning))
    return folder


def test_at_0_the_knob_gives_the_bases_picture_to_the_bit_and_at_1_the_tuned_ones(lora):
    untouched = picture(base("sdxl"))
    plain = base("sdxl")
    plain.load_lora_weights(lora)
    with_knob = base("sdxl")
    knob = AnchorKnob(with_knob, lora)
    knob.set(0.0)
    assert torch.equal(picture(with_knob), untouched)
    knob.set(1.0)
    assert torch.equal(picture(with_knob), picture(plain))
    knob.set(0.0)
    assert torch.equal(picture(with_knob), untouched)


def test_drift_from_the_base_grows_with_every_step_of_the_knob(lora):
    pipeline = base("sdxl")
    noisy = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states, _, pooled, _ = pipeline.encode_prompt([PROMPT] * 4, do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]] * 4)}

    def predict():
        with torch.no_grad():
            return pipeline.unet(noisy, torch.tensor(200), encoder_hidden_states=states, added_cond_kwargs=added).sample

    wanted = predict()
    knob, drifts = AnchorKnob(pipeline, lora), []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        knob.set(strength)
        drifts.append(float((predict() - wanted).square().mean()))
    assert drifts[0] == 0 and all(later > earlier for earlier, later in pairwise(drifts))


def test_a_range_of_timesteps_has_a_strength_of_its_own(lora):
    pipeline = base("sdxl")
    knob = AnchorKnob(pipeline, lora)
    knob.set(1.0, [Range(low=0, high=1000, strength=0.0)])
    assert torch.equal(picture(pipeline), picture(base("sdxl")))
    knob.set(0.0, [parse_range("300:0:1")])
    assert [knob.at(timestep) for timestep in (301, 300, 150, 0)] == [0, 1, 1, 1]
    late_only = picture(pipeline)
    assert not torch.equal(late_only, picture(base("sdxl")))
    knob.set(1.0)
    assert not torch.equal(late_only, picture(pipeline))


def test_kohyas_layout_turns_the_same_knob(runs, lora, tmp_path, monkeypatch, capsys):
    _, report, _ = command(monkeypatch, capsys, "export", runs["sdxl"], "--out", tmp_path / "k", "--format", "kohya")
    pictures = []
    for file in (lora, Path(report["file"])):
        pipeline = base("sdxl")
        AnchorKnob(pipeline, file).set(0.5)
        pictures.append(picture(pipeline))
    torch.testing.assert_close(pictures[0], pictures[1], rtol=0, atol=1e-4)


def test_a_lora_of_another_architecture_is_refused_with_both_widths(tmp_path):
    layers = {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.zeros(4, 768)}
    save_file(kohya_layers(layers, family="sd15", layers_per_block=2), tmp_path / "sd15.safetensors")
    with pytest.raises(ModelError, match=r"width 768 \(Stable Diffusion 1\.x\), and this one reads 64"):
        AnchorKnob(base("sdxl"), tmp_path / "sd15.safetensors")


def test_a_lora_whose_modules_have_no_place_is_refused(tmp_path):
    stem = "unet.down_blocks.7.attentions.0.proj_in"
    save_file(
        {f"{stem}.lora_A.weight": torch.zeros(4, 72), f"{stem}.lora_B.weight": torch.zeros(72, 4)},
        tmp_path / "deeper.safetensors",
    )
    with pytest.raises(ModelError, match="belongs to another"):
        AnchorKnob(base("sdxl"), tmp_path / "deeper.safetensors")


def test_files_without_low_rank_layers_are_refused(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name, message in (("broken", "cannot be read"), ("other", "no LoRA layers"), ("absent", "found nothing")):
        with pytest.raises(ModelError, match=message):
            AnchorKnob(base("sdxl"), tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("text", ["a:b:c", "0:1", "0:300:1.5"])
def test_ranges_that_say_nothing_are_refused(text):
    with pytest.raises(UsageError, match="strength"):
        parse_range(text)


def test_a_grid_is_drawn_over_strengths_by_command(lora, tmp_path, monkeypatch, capsys):
    assert parse_grid("0,0.5,1") == (0.0, 0.5, 1.0)
    code, report, err = command(
        monkeypatch, capsys, "generate", "toy-sdxl", "--prompt", PROMPT, "--lora", lora, "--grid", "0,0.5,1",
        "--steps", 3, "--out", tmp_path / "grid",
    )  # fmt: skip
    assert code == 0, err
    assert [row["anchor_strength"] for row in report["pictures"]] == [0.0, 0.5, 1.0]
    assert len({Path(row["path"]).read_bytes() for row in report["pictures"]}) == 3
    _, plain, _ = command(
        monkeypatch, capsys, "generate", "toy-sdxl", "--prompt", PROMPT, "--steps", 3, "--out", tmp_path / "base"
    )
    # Strength 0 is what the command draws without any LoRA, to the byte of the file.
    assert Path(plain["pictures"][0]["path"]).read_bytes() == Path(report["pictures"][0]["path"]).read_bytes()


def test_a_strength_without_a_lora_needs_a_run_that_exported_one(tmp_path, monkeypatch, capsys):
    asked = ["generate", "toy-sdxl", "--prompt", PROMPT, "--anchor-strength", 0.5, "--out", tmp_path]
    code, _, err = command(monkeypatch, capsys, *asked)
    assert code == 2 and "--lora FILE" in err


def draw(monkeypatch, capsys, out: Path, *asked) -> list[Image.Image]:
    """Pictures of `acpo generate` in three steps."""
    arguments = ["generate", *asked, "--prompt", PROMPT, "--steps", 3, "--out", out]
    code, report, err = command(monkeypatch, capsys, *arguments)
    assert code == 0, err
    return [Image.open(row["path"]) for row in report["pictures"]]


def test_a_lora_that_is_named_goes_on_what_the_run_tuned_and_not_on_its_export(
    runs, lora, tmp_path, monkeypatch, capsys
):
    [wanted] = draw(monkeypatch, capsys, tmp_path / "base", "toy-sdxl", "--lora", lora)
    run = Path(shutil.copytree(runs["sdxl"], tmp_path / "run"))
    export(run, run / "export", layout="merged", weights="raw")
    [found] = draw(monkeypatch, capsys, tmp_path / "run-and-lora", run, "--lora", lora)
    assert found.tobytes() == wanted.tobytes()


def test_the_base_of_a_runs_strengths_is_opened_as_the_run_opened_it(tmp_path, monkeypatch, capsys):
    # As `hf download --include "*.fp16.safetensors"` leaves Stable Diffusion 1.5: half of the files, and no checker.
    folder = tmp_path / "sd15"
    base("sd15").save_pretrained(folder, variant="fp16")
    index = json.loads((folder / "model_index.json").read_text())
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps(index | checker))
    run = finished_run("sd15", tmp_path / "run", f"model.path={folder}", "model.variant=fp16")
    export(run, run / "export" / "lora", layout="diffusers-lora", weights="raw")
    pictures = draw(monkeypatch, capsys, tmp_path / "grid", run, "--grid", "0,1")
    [plain] = draw(monkeypatch, capsys, tmp_path / "plain", "toy-sd15")
    assert pictures[0].tobytes() == plain.tobytes() != pictures[1].tobytes()


def test_a_run_draws_in_its_own_size_and_away_from_its_own_negative_prompt(tmp_path, monkeypatch, capsys):
    own = ["model.image_size=48", f"model.negative_prompt={PROMPT}"]
    run = finished_run("sdxl", tmp_path / "run", *own)
    done = export(run, run / "export", layout="merged", weights="raw")
    card = done.card.read_text()
    assert f'height=48, width=48, negative_prompt="{PROMPT}"' in card and "| picture size | 48 |" in card
    [found] = draw(monkeypatch, capsys, tmp_path / "own", run)
    asked = ["--size", 48, "--negative-prompt", PROMPT]
    [wanted] = draw(monkeypatch, capsys, tmp_path / "asked", run / "export", *asked)
    assert found.size == (48, 48) and found.tobytes() == wanted.tobytes()
    assert draw(monkeypatch, capsys, tmp_path / "small", run, "--size", 32)[0].size == (32, 32)
    code, _, err = command(monkeypatch, capsys, "generate", run, "--prompt", PROMPT, "--size", 30, "--out", tmp_path)
    assert code == 2 and "multiple of 8, found 30" in err


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


def test_the_knob_turns_text_encoders_that_the_file_adapts_too(text_lora):
    untouched, plain, with_knob = base("sdxl"), base("sdxl"), base("sdxl")
    plain.load_lora_weights(text_lora)
    knob, wanted = AnchorKnob(with_knob, text_lora), picture(untouched)
    knob.set(0.0)
    assert torch.equal(picture(with_knob), wanted)
    knob.set(1.0)
    assert torch.equal(picture(with_knob), picture(plain))
    plain.set_adapters(plain.get_active_adapters(), 0.5)
    knob.set(0.5)
    torch.testing.assert_close(picture(with_knob), picture(plain), rtol=0, atol=1e-5)


def test_a_range_of_timesteps_is_refused_where_the_text_would_need_one_too(text_lora):
    knob = AnchorKnob(base("sdxl"), text_lora)
    with pytest.raises(UsageError, match="adapts text encoders too"):
        knob.set(1.0, [Range(low=0, high=300, strength=0.5)])
