"""The example loop computes the same first iteration as the training loop."""

import importlib.util
from pathlib import Path

from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive

EXAMPLE = Path(__file__).parents[2] / "examples/minimal_loop.py"


def test_the_minimal_loop_has_the_metrics_of_the_real_loop_in_its_first_iteration(tiny, tmp_path):
    spec = importlib.util.spec_from_file_location("minimal_loop", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    config = tiny("run.iterations=1", "algorithm.anchor.start=0.5", f"run.dir={tmp_path / 'run'}")
    (found,) = example.train(config)
    drive(config, open_ports, Console(quiet=True))
    expected = read_metrics(tmp_path / "run/metrics.jsonl")[0]
    shared = {name for name in found if not name.startswith("time/")}
    assert {"anchor/weight", "reward/two_stream/gain", "judge/strided_judge/gain", "anchor/uniform"} <= shared
    assert {name: found[name] for name in shared} == {name: expected[name] for name in shared}


def test_the_minimal_loop_fits_on_two_screens():
    assert len(EXAMPLE.read_text().splitlines()) <= 150
