"""benchmarks/algorithms.py: its tables from stored evaluations, and those of docs/algorithms.md."""

import json
import re
import runpy
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return runpy.run_path(str(ROOT / "benchmarks/algorithms.py"))


def evaluation(arm: str, seed: int, iteration: int, **changes: float) -> dict:
    base = {
        "cpu_seconds": 5.0, "calls": 1000, "judge": 0.5, "oracle_mse": 0.004, "template_entropy": 5.0,
        "caption_accuracy": 0.8, "drift": 0.0, "kept": 1.0,
    }  # fmt: skip
    return {"arm": arm, "seed": seed, "iteration": iteration, **base, **changes}


RUNS = [
    evaluation("acpo", 0, 0),
    evaluation("acpo", 0, 10, cpu_seconds=25.0, calls=11_000, judge=0.6, oracle_mse=0.002, drift=0.1, kept=0.9),
    evaluation("acpo", 1, 10, cpu_seconds=45.0, calls=31_000, judge=0.7, oracle_mse=0.001, drift=0.3, kept=0.5),
    evaluation("acpo", 1, 0),
    evaluation("nft", 0, 0),
    evaluation("nft", 0, 10, cpu_seconds=105.0, calls=50_000, judge=0.55, oracle_mse=0.003, drift=0.01),
]


def test_the_table_has_ratios_to_the_base_model_of_the_seed_and_the_cost_without_calibration(script):
    text = script["make_table"](RUNS, 0.7)
    # Gains in spreads: 0.3 / stdev(1.2, 1.4) and 0.625 / stdev(0.5, 0.25).
    acpo = ("1.30 [1.20..1.40]", "0.375 [0.250..0.500]", "2.1, 3.5", "0.200 [0.100..0.300]", "0.700 [0.500..0.900]")
    assert f"| acpo | 2 | {' | '.join(acpo)} |" in text
    assert "| acpo | 1.00 [1.00..1.00] | 1.00 [1.00..1.00] | 20 k | 20 k |" in text
    assert "| nft | 1.00 | 1.00 | 49 k | reached by 0 of 1 |" in text


def test_runs_are_compared_at_equal_compute_and_at_equal_drift_by_interpolation(script):
    at_compute = script["compare_at"](RUNS, "cpu_seconds", "10")
    assert (
        "| acpo | 2 of 2 | 1.10 [1.10..1.10] | 0.781 [0.750..0.812] | 1.00 [1.00..1.00] | 0.912 [0.875..0.950] |"
        in at_compute
    )
    at_drift = script["compare_at"](RUNS, "drift", "0.2")
    assert "| acpo | 1 of 2 | 1.27 | 0.500 | 1.00 | 0.667 | 20 k |" in at_drift
    assert "| nft | 0 of 1 | - | - | - | - | - |" in at_drift


def test_stored_evaluations_are_read_again(script, tmp_path):
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in RUNS) + "| a table |\n")
    stored = tmp_path / "algorithms.json"
    stored.write_text(json.dumps({"evaluations": RUNS}))
    assert script["read_lines"](lines) == script["read_lines"](stored) == RUNS


def test_a_run_that_has_finished_is_not_repeated_and_carries_its_overrides_in_its_name(script, tmp_path):
    (tmp_path / "runs.jsonl").write_text(json.dumps({"key": "run acpo 0 240 10 a.b=1", "value": RUNS[:2]}) + "\n")
    options = Namespace(out=tmp_path, samples=240, every=10, overrides=["a.b=1"])
    assert script["finished_or_run"]("acpo", 0, options) == [{**row, "arm": "acpo a.b=1"} for row in RUNS[:2]]


def test_a_run_is_evaluated_at_regular_iterations_and_after_the_last(script):
    class Channel:
        def publish(self, version: int) -> str:
            return f"checksum {version}"

    evaluated: list[int] = []
    watched = script["Watched"](Channel(), evaluated.append, every=10, last=15)
    assert [watched.publish(version) for version in range(16)][-1] == "checksum 15"
    assert evaluated == [0, 10, 15]


def test_the_tables_of_the_page_are_those_of_its_stored_evaluations(script):
    page = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8")
    stored = script["read_lines"](ROOT / "docs/evidence/algorithms.json")
    points = re.findall(r"--table docs/evidence/algorithms\.json --at (\w+)=([\d.]+)", page)
    assert len(points) == 2
    tables = [script["make_table"](stored, 0.7), *(script["compare_at"](stored, *point) for point in points)]
    assert not [line for table in tables for line in table.splitlines() if line not in page]
