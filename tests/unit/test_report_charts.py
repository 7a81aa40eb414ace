"""Charts have the values of a run, gaps for missing values, and a name for every point."""

import pytest

from acpo_dist.analysis.report import charts
from acpo_dist.analysis.report.compare import seed_groups
from acpo_dist.analysis.report.drift_map import DriftMap
from acpo_dist.analysis.report.metrics import metrics_of
from acpo_dist.analysis.report.record import read_run
from tests.helpers.runs import make_run, row

ROWS = [row(i, reward=0.5 + 0.1 * i, judge=0.4, drift=0.1 + 0.01 * i) for i in range(4)]


def traces(chart):
    return {trace.get("name", ""): trace for trace in chart.figure["data"]}


def test_a_curve_has_every_value_of_a_run_and_a_gap_where_one_was_not_finite(tmp_path):
    rows = [*ROWS[:2], ROWS[2] | {"drift/rms": None}, ROWS[3]]
    record = read_run(make_run(tmp_path / "run", rows, "guard.drift_budget=0.2"))
    chart = charts.drift_over_time(record, metrics_of(record))
    assert list(traces(chart)["rms drift"]["x"]) == [1, 2, 3, 4]
    assert list(traces(chart)["rms drift"]["y"]) == [0.1, 0.11, None, 0.13]
    (line,) = chart.figure["layout"]["shapes"]
    assert line["y0"] == line["y1"] == 0.2 and "rms drift" in chart.label


def test_gains_are_in_base_standard_deviations_where_a_checkpoint_knows_them(tmp_path):
    known = charts.gains_over_time(read_run(make_run(tmp_path / "known", ROWS, checkpoint=4)))
    assert list(traces(known)["reward two_stream"]["y"]) == pytest.approx([0, 0.5, 1, 1.5])
    raw = charts.gains_over_time(read_run(make_run(tmp_path / "raw", ROWS)))
    assert list(traces(raw)["reward two_stream"]["y"]) == pytest.approx([0.5, 0.6, 0.7, 0.8])


def test_quality_against_drift_names_every_point_and_shows_seeds_and_front(tmp_path):
    gains = [{"two_stream": 1.0, "strided_judge": value} for value in (0.2, 0.4, 0.1)]
    overrides = ["run.seed=0", "run.seed=1", "learner.learning_rate=0.5"]
    drifts = (0.0, 0.0, -0.05)
    records = [
        read_run(
            make_run(
                tmp_path / str(index),
                [each | {"drift/rms": each["drift/rms"] + drifts[index]} for each in ROWS],
                overrides[index],
                gains=gains[index],
                checkpoint=4,
            )
        )
        for index in range(3)
    ]
    metrics, labels = [metrics_of(record) for record in records], ["a", "b", "c"]
    chart = charts.quality_against_drift(records, metrics, labels, seed_groups(records, metrics, labels))
    finals = {trace["name"]: trace for trace in chart.figure["data"] if trace["mode"] == "markers"}
    for label, each in zip(labels, metrics, strict=True):
        assert (list(finals[label]["x"]), list(finals[label]["y"])) == ([each.drift], [each.quality])
        assert finals[label]["text"][0].startswith(f"{label}, final weights")
    trail = next(trace for trace in chart.figure["data"] if trace["mode"] == "lines+markers")
    assert len(trail["text"]) == len(ROWS) and trail["text"][0].startswith("a, iteration 1: ")
    seeds = next(trace for name, trace in finals.items() if "2 seeds" in name)
    assert list(seeds["y"]) == pytest.approx([0.3])
    assert list(traces(chart)["Pareto front"]["y"]) == [0.1, 0.4]
    assert finals["a"]["marker"]["color"] == finals["b"]["marker"]["color"] != finals["c"]["marker"]["color"]


def test_drift_by_timestep_is_shown_on_a_logarithmic_scale_with_its_values(tmp_path):
    drift = DriftMap(timesteps=[900, 20], iterations=[10, 20], values=[[0.1, 0.2], [0.001, None]], space="v", source="")
    (trace,) = charts.drift_by_timestep(drift).figure["data"]
    assert list(trace["y"]) == ["20", "900"] and [list(line) for line in trace["text"]] == [
        ["0.001", ""],
        ["0.1", "0.2"],
    ]
    assert trace["z"][0][0] == pytest.approx(-3) and trace["z"][0][1] is None
    assert trace["customdata"][0][0] == "timestep 20, iteration 10: 0.001"


def test_a_chart_without_values_is_left_out(tmp_path):
    record = read_run(make_run(tmp_path / "run", [{"iteration": 0, "reward/two_stream/mean": None}]))
    metrics = metrics_of(record)
    assert charts.gains_over_time(record) is None and charts.guard_over_time(record) is None
    assert charts.drift_over_time(record, metrics) is None and charts.guard_rules(metrics.guard) is None
    assert charts.quality_against_drift([record], [metrics], ["a"], seed_groups([record], [metrics], ["a"])) is None
    empty = DriftMap(timesteps=[1], iterations=[1], values=[[None]], space="eps", source="")
    assert charts.drift_by_timestep(empty) is None
