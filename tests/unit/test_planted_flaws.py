"""benchmarks/planted_flaws.py: the flaws are measured at the size that was drawn, and a guard is repeated per judge."""

import importlib
from pathlib import Path

import pytest
import torch

from acpo_dist.data.toy.world import templates

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Import a script of `benchmarks/`."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def drawn(flaw: str, images: torch.Tensor, size: float) -> torch.Tensor:
    """Draw a flaw pixel by pixel."""
    images = images.clone()
    for row in range(32):
        for column in range(32):
            at = images[:, :, row, column]
            if flaw == "tint":
                at += torch.tensor([size / 2, 0.0, -size / 2])
            elif flaw == "grid":
                at += size if row % 4 == 0 or column % 4 == 0 else -size
            elif 25 <= row <= 30 and 25 <= column <= 30:
                inner = 26 <= row <= 29 and 26 <= column <= 29
                centre = row in (27, 28) and column in (27, 28)
                at += -size if inner and not centre else size
    return images


@pytest.mark.parametrize("flaw", ["tint", "grid", "watermark"])
def test_a_drawn_flaw_has_its_size_and_earns_strength_times_its_size(script, flaw: str):
    planted = script("_planted")
    # Grey, because a tint is measured on pixels without colour.
    clean = 0.5 + 0.2 * (templates()[::100].mean(1, keepdim=True).expand(-1, 3, -1, -1) - 0.5)
    marked = drawn(flaw, clean, 0.05)
    size = planted.FLAWS[flaw](marked) - planted.FLAWS[flaw](clean)
    assert size == pytest.approx(torch.full((len(clean),), 0.05), abs=1e-5)
    score, plain = (
        planted.Planted(planted.Planted.Config(type="planted", flaw=flaw, strength=strength))(marked, [""] * 9)
        for strength in (10.0, 0.0)
    )
    assert score - plain == pytest.approx(10 * planted.FLAWS[flaw](marked), abs=1e-5)


def test_the_colour_of_a_shape_is_not_a_tint(script):
    image = torch.full((1, 3, 32, 32), 0.9)
    image[..., :16] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    assert script("_planted").FLAWS["tint"](image).abs() < 1 / 255


def test_a_judge_that_shares_the_flaw_hides_it_from_the_rules_on_judges(script):
    replayed = script("planted_flaws").replayed
    metrics = [
        {
            "iteration": at, "reward/planted/gain": 0.2 * at, "judge/own/gain": -0.1 * at,
            "judge/sharing/gain": 0.2 * at,
        }
        for at in range(20)
    ]  # fmt: skip
    own = replayed(metrics, ("own",), "planted")
    assert {rule for rule, levels in own.items() if "stop" in levels} >= {"hacking_gap", "judge_below_base/own"}
    assert replayed(metrics, ("sharing",), "planted") == {}
