"""benchmarks/gpu_sdxl.py in its tiny form: every row is there for every family and its arithmetic adds up."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest

from tests.helpers.flow_models import tiny_flux2, tiny_zimage

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_sdxl.py"


FOLDERS = {"zimage": (tiny_zimage, []), "flux2_klein": (tiny_flux2, ["model.text_layers=[1, 3]"])}
"""Families without an embedded toy."""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd15", "sd3", "zimage", "flux2_klein"])
def test_the_tiny_form_measures_every_row(family, tmp_path, monkeypatch, capsys):
    asked = [str(SCRIPT), "--tiny", "--family", family, "--out", str(tmp_path / "out.json")]
    if family in FOLDERS:
        build, overrides = FOLDERS[family]
        build(tmp_path / family)
        asked += ["--folder", str(tmp_path / family), *overrides]
    monkeypatch.setattr(sys, "argv", asked)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    report = json.loads((tmp_path / "out.json").read_text())
    names = [row["name"] for row in report["rows"]]
    assert names == [
        "diffusers, 3 steps", "rollout, 3 steps", "rollout, 2 steps (VRG)", "ACPO, LoRA, 3 steps",
        "ACPO, LoRA, 2 steps (VRG)", "ACPO, full, 3 steps",
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["per_second"] == pytest.approx(row["samples"] / row["seconds"])
        assert row["tflops"] == pytest.approx(row["per_second"] * row["teraflops_per_sample"])
        assert row["share_of_peak"] == pytest.approx(row["tflops"] / report["peak_tflops"])
    training = next(row for row in report["rows"] if row["name"] == "ACPO, LoRA, 3 steps")
    assert set(training["phases"]) == {"rollout", "reward", "learn", "sync"}
    assert sum(training["phases"].values()) == pytest.approx(training["seconds"], rel=0.05)
    # Rollouts and plain diffusers do the same arithmetic.
    assert report["rows"][0]["teraflops_per_sample"] == report["rows"][1]["teraflops_per_sample"]
    # No allocator statistics on the CPU: null in the table, never 0.
    assert all(math.isnan(row["peak_gib"]) for row in report["rows"])
    assert "measured peak" in capsys.readouterr().out
