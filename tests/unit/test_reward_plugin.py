"""A reward is one file and one line of the registry or `module:Class`: written as by an outside user, then used."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from acpo_dist.cli.app import main
from acpo_dist.core.registry import REWARDS, Plugin
from tests.conftest import TINY

FILE = '''
"""Warmth of an image."""

from typing import ClassVar

from acpo_dist.config.plugins import MetricConfig


class Warmth:
    """Mean of red minus mean of blue."""

    class Config(MetricConfig):
        """Which way is warm."""

        scale: float = 1.0
        """Factor on the score."""

        score_range: ClassVar[str] = "-1, 1"
        minimum_size: ClassVar[int] = 2
        licence: ClassVar[str] = "code: MIT"
        lightweight: ClassVar[bool] = True

    def __init__(self, config, *, device="cpu"):
        self.scale = config.scale

    def __call__(self, images, prompts):
        return self.scale * (images[:, 0] - images[:, 2]).mean((1, 2))
'''


@pytest.fixture(params=["a line of the registry", "module:Class"])
def reward(request, tmp_path, monkeypatch) -> str:
    (tmp_path / "outside_warmth.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    if request.param == "module:Class":
        return "outside_warmth:Warmth"
    monkeypatch.setitem(REWARDS, "warmth", Plugin("outside_warmth:Warmth"))
    return "warmth"


def acpo(monkeypatch, capsys, *arguments: str) -> dict:
    """JSON answer of a command that succeeds."""
    monkeypatch.setattr(sys, "argv", ["acpo", *arguments, "--json"])
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_reward_in_one_file_scores_and_trains(reward, tmp_path: Path, monkeypatch, capsys):
    image = torch.zeros(8, 8, 3, dtype=torch.uint8)
    image[..., 0] = 255
    Image.fromarray(image.numpy()).save(tmp_path / "red.png")
    found = acpo(monkeypatch, capsys, "score", str(tmp_path / "red.png"), "--reward", reward)
    assert found["scores"][0][reward] == pytest.approx(1)
    used = [f"rewards.train=[{{type: '{reward}', scale: 2}}]", "run.iterations=1", f"run.dir={tmp_path / 'run'}"]
    found = acpo(monkeypatch, capsys, "plan", "toy_sdxl", *TINY, *used)
    assert not any(reward in text for text in found["warnings"]), "a lightweight reward needs no memory warning"
    # A name is resolved to the same class by every command.
    if ":" in reward:
        found = acpo(monkeypatch, capsys, "train", "toy_sdxl", *TINY, *used)
        assert found["iterations"] == 1 and any(reward in name for name in found["metrics"])


def test_a_registered_reward_is_listed_with_the_facts_of_its_class(tmp_path, monkeypatch, capsys):
    (tmp_path / "outside_warmth.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(REWARDS, "warmth", Plugin("outside_warmth:Warmth"))
    rows = acpo(monkeypatch, capsys, "rewards", "list")["rewards"]
    row = next(row for row in rows if row["name"] == "warmth")
    assert (row["range"], row["minimum_size"], row["licence"]) == ("-1, 1", 2, "code: MIT")
    assert (row["differentiable"], row["direction"], row["needs_prompts"]) == (True, "higher", False)
