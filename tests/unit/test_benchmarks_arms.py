"""Every arm of a benchmark is a valid configuration."""

import runpy
from pathlib import Path

import pytest

from acpo_dist.config.load import load_config

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ARMS = {
    "algorithms": lambda arm: (arm[0], arm[1:]),
    "guard": lambda arm: arm,
    "planted_flaws": lambda arm: ("toy_sdxl", arm),
    "real_images": lambda arm: ("cifar10_ddpm", ["data.path=cifar10_train.parquet", *arm]),
}
"""Script -> what an entry of its `ARMS` stands for: configuration and overrides."""


@pytest.mark.parametrize("script", ARMS)
def test_every_arm_of_a_benchmark_is_a_valid_configuration(script, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    Path("cifar10_train.parquet").touch()
    arms = runpy.run_path(str(BENCHMARKS / f"{script}.py"))["ARMS"]
    for arm in arms.values():
        load_config(*ARMS[script](arm))
