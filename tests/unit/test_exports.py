"""Exported files open in plain diffusers with the same image and the weights of the checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from acpo_dist.config.load import load_config
from acpo_dist.core.types import PromptGroup, SamplePlan
from acpo_dist.models.file_metadata import model_metadata, training_metadata
from acpo_dist.models.lora_files import text_width
from acpo_dist.training.export import UNSHIFTED
from acpo_dist.training.open_model import open_rollouts
from acpo_dist.workers.learner.checkpoint import CheckpointStore
from tests.helpers.exports import (
    ASSETS,
    EXPORTED,
    PROMPT,
    base,
    command,
    finished_run,
    image,
    opened,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """One run per family."""
    return {kind: finished_run(kind, tmp_path_factory.mktemp("runs") / kind) for kind in EXPORTED}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [*((kind, layout) for kind in ("sdxl", "sd15") for layout in ("comfy", "diffusers")), ("flow", "diffusers")],
)
def test_an_exported_lora_gives_plain_diffusers_the_merged_pipelines_image(
    runs, kind, layout, tmp_path, monkeypatch, capsys
):
    asked = ["export", runs[kind], "--out", tmp_path / "lora", "--format", layout]
    code, report, err = command(monkeypatch, capsys, *asked)
    assert code == 0, err
    command(monkeypatch, capsys, "export", runs[kind], "--out", tmp_path / "merged", "--format", "merged")
    plain = base(kind)
    untouched = image(plain)
    plain.load_lora_weights(tmp_path / "lora", weight_name=Path(report["file"]).name)
    wanted = image(opened(tmp_path / "merged", kind))
    assert float((wanted - untouched).abs().max()) > 0.05
    # Two float32 sums in another order, through four guided steps and the decoder.
    torch.testing.assert_close(image(plain), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", EXPORTED)
def test_the_exported_schedule_makes_plain_diffusers_draw_the_rollouts_image(runs, kind, tmp_path, monkeypatch, capsys):
    asked = ["export", runs[kind], "--out", tmp_path / "merged", "--format", "merged"]
    _, report, _ = command(monkeypatch, capsys, *asked)
    scheduler, changes, more = EulerDiscreteScheduler, {"timestep_spacing": "leading"}, {}
    if kind == "flow":
        # Without T5 the pipeline adds 256 zero tokens; toy-flow was trained with one.
        scheduler, changes, more = FlowMatchEulerDiscreteScheduler, UNSHIFTED, {"max_sequence_length": 1}
    levels = json.loads(Path(report["schedule"]).read_text())["diffusers"][scheduler.__name__]
    plain = opened(tmp_path / "merged", kind)
    plain.scheduler = scheduler.from_config(plain.scheduler.config, **changes)
    config = load_config(runs[kind] / "resolved.yaml")
    pool = open_rollouts(config, runs[kind])
    assert pool.trajectory().timesteps == (999.0, 700.0, 300.0, 60.0)
    plan = SamplePlan(sample_id="a", prompt_id=0, prompt=PROMPT, seed=3)
    [handle] = pool.generate([PromptGroup(prompt_id=0, prompt=PROMPT, samples=(plan,))])
    noise = torch.randn(handle.payload.latents_BCHW.shape, generator=torch.Generator().manual_seed(3))
    more |= {"sigmas": levels["sigmas"], "guidance_scale": config.sampler.guidance_scale}
    with torch.no_grad():
        drawn = plain(PROMPT, latents=noise, output_type="pt", **more).images
    wanted = handle.payload.images_BCHW.float() / 255
    # Ours is rounded to 8 bits.
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1.01 / 255)
    card = Path(report["card"]).read_text()
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    assert "EulerDiscreteScheduler" in card and "schedule.json" in card


def test_averaged_weights_are_exported_on_request(runs, tmp_path, monkeypatch, capsys):
    for weights in ("raw", "ema"):
        command(monkeypatch, capsys, "export", runs["sdxl"], "--out", tmp_path / weights, "--weights", weights)
    raw, ema = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("raw", "ema"))
    assert all(torch.allclose(ema[name], raw[name] / 2) for name in raw if not name.endswith(".alpha"))


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


def test_full_tuning_has_no_lora_and_a_taken_folder_is_refused(runs, tmp_path, monkeypatch, capsys):
    run = finished_run("sdxl", tmp_path / "full", "model.tuning.method=full")
    code, _, err = command(monkeypatch, capsys, "export", run, "--out", tmp_path / "a", "--format", "comfy")
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
    """A run that the guard rolled back from iteration 5 to the checkpoint of iteration 3."""
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


def test_an_export_after_a_roll_back_to_the_base_model_is_refused(taken_back, tmp_path, monkeypatch, capsys):
    rolled_back(taken_back, best=0)
    code, _, err = command(monkeypatch, capsys, "export", taken_back, "--out", tmp_path / "out")
    assert code == 2 and "rolled back to the base model, whose checkpoint does not exist" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_kohyas_file_names_its_stable_diffusion_version_and_prediction_type(tmp_path):
    folder = Path(shutil.copytree(ASSETS / "toy-sd15", tmp_path / "v"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    first, second = (
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.zeros(4, width)}
        for width in (768, 1024)
    )
    plain, velocity = (load_config("toy_sd15", given).model for given in ([], [f"model.path={folder}"]))
    asked = ((plain, first), (plain, second), (velocity, second))
    # As kohya's own scripts compose it: `sd`, the generation, `_v` for velocity.
    found = [training_metadata(*pair) for pair in asked]
    assert [said["ss_base_model_version"] for said in found] == ["sd_v1", "sd_v2", "sd_v2_v"]
    assert [said["ss_v2"] for said in found] == ["False", "True", "True"]
    models = [model_metadata(m, title="t", date="d", lora=True, width=text_width(layers)) for m, layers in asked]
    assert [said["modelspec.prediction_type"] for said in models] == ["epsilon", "epsilon", "v"]
    names = ["stable-diffusion-v1/lora", "stable-diffusion-v2-512/lora", "stable-diffusion-v2-768-v/lora"]
    assert [said["modelspec.architecture"] for said in models] == names
