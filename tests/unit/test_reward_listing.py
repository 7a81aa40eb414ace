"""`acpo rewards list` agrees with the metrics; rewards on text need a model that takes prompts."""

import json
from pathlib import Path

import pytest
import torch

from acpo_dist.core.errors import RewardConfigError, RewardError
from acpo_dist.core.registry import REWARDS, resolve
from acpo_dist.rewards.listing import RewardRow, reward_listing
from acpo_dist.rewards.pyiqa_table import PYIQA

LISTING = reward_listing()
WITHOUT_DOWNLOAD = [
    row["name"] for row in LISTING if row["type"] != "pyiqa" and row["space"] == "image" and not row["needs_download"]
]


def test_every_registered_metric_and_every_name_of_pyiqa_is_listed_once():
    names = [row["name"] for row in LISTING]
    wanted = [name for name in REWARDS if name != "pyiqa"] + [f"pyiqa:{name}" for name in PYIQA]
    assert sorted(names) == sorted(wanted) and len(set(names)) == len(names)


def test_every_row_has_every_field_filled():
    for row in LISTING:
        assert set(row) == set(RewardRow.__annotations__)
        assert row["range"] and row["licence"] and row["minimum_size"] >= 1 and row["direction"] in ("higher", "lower")


@pytest.mark.parametrize("name", WITHOUT_DOWNLOAD)
def test_what_needs_no_download_scores_the_smallest_image_and_none_smaller(name: str):
    row = next(row for row in LISTING if row["name"] == name)
    kind = resolve("reward", REWARDS, name)
    metric, size = kind(kind.Config()), row["minimum_size"]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(metric(images, [""] * 2)).all())
    if size > 1 and name != "strided_judge":
        with pytest.raises((RewardError, ValueError), match=f"at least {size} x {size}"):
            metric(images[..., 1:], [""] * 2)


def test_metrics_that_read_prompts_are_marked():
    assert {row["name"] for row in LISTING if row["needs_prompts"]} == {
        "clip_score", "pick_score", "ipce", "pyiqa:clipscore",
    }  # fmt: skip


def test_the_command_answers_with_one_json_object(acpo):
    code, out, _ = acpo("rewards", "list", "--json")
    assert code == 0 and json.loads(out) == {"rewards": LISTING}


def test_the_command_prints_a_table_with_every_name(acpo, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = acpo("rewards", "list")
    assert code == 0 and all(row["name"] in out for row in LISTING)


@pytest.mark.parametrize("role", ["train", "judges"])
@pytest.mark.parametrize("kind", ["clip_score", "pick_score", "ipce"])
def test_an_unconditional_model_with_a_text_metric_is_refused_before_anything_starts(
    role: str, kind: str, tiny, tmp_path: Path
):
    entry = f"{{type: {kind}, weights: {tmp_path}}}"
    words = rf"rewards\.{role}\.0 \(`{kind}`\): compares images with their prompts"
    with pytest.raises(RewardConfigError, match=words):
        tiny("model={type: ddpm, path: toy-ddpm}", "data.prompts=none", f"rewards.{role}=[{entry}]")


def test_a_text_metric_without_its_model_is_refused_before_anything_starts(tiny):
    with pytest.raises(RewardConfigError, match=r"rewards\.train\.0 \(`clip_score`\):.*nowhere"):
        tiny("rewards.train=[{type: clip_score, weights: ./nowhere}]")


def test_a_conditional_model_takes_a_text_metric(tiny, tmp_path: Path):
    from acpo_dist.rewards.training.tiny_clip import new_tiny_clip, save_tiny_clip

    save_tiny_clip(tmp_path, new_tiny_clip())
    config = tiny(f"rewards.train=[{{type: ipce, weights: {tmp_path}}}]")
    assert config.rewards.train[0].name == "ipce"


def test_measured_gradients_are_those_of_the_committed_study():
    study = json.loads((Path(__file__).resolve().parents[2] / "docs/evidence/published_metrics.json").read_text())
    listed = {row["name"].removeprefix("pyiqa:"): row for row in LISTING}
    assert {name for name, row in listed.items() if row["gradient_step"]} == {"brisque", "niqe", "two_stream"}
    for name in ("brisque", "niqe", "piqe", "two_stream"):
        measured = study["gradient"]["two_stream:toy" if name == "two_stream" else name]
        usable = measured["finite"] == measured["images"] and measured["zero"] == 0
        assert listed[name]["differentiable"] == usable
        assert listed[name]["gradient_step"] == measured.get("largest_useful_step")
