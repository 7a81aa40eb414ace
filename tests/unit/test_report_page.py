"""The report of a real run, opened in a real browser."""

import base64
import json
import re
import sys
from html import unescape

import numpy as np
import pytest
import torch
from PIL import Image

from acpo_dist.analysis.report.build import GalleryOptions, build_report
from acpo_dist.analysis.report.charts import DARK, LIGHT
from acpo_dist.analysis.report.record import read_run
from acpo_dist.cli.app import main
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import LocalRewards, LocalRollouts, open_ports
from acpo_dist.training.run import drive
from acpo_dist.training.run_folder import read_run_config
from acpo_dist.workers.learner.checkpoint import CheckpointStore
from tests.conftest import TINY
from tests.helpers.browser import Browser
from tests.helpers.runs import make_run, row

QUIET = Console(quiet=True)
OPTIONS = GalleryOptions(prompts=2, per_prompt=2, at="export")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs, the second without an anchor, and the report of both."""
    from acpo_dist.config.load import load_config

    folder = tmp_path_factory.mktemp("runs")
    # The second measures no drift by timestep while it trains, as runs without a guard's probe.
    off = ["algorithm.anchor.weight=0", "algorithm.anchor.budget=null", "guard.drift_timesteps=0"]
    arms = {"acpo": [], "reward_only": off}
    for name, overrides in arms.items():
        common = ["run.iterations=3", "checkpoint.every=2", f"run.dir={folder / name}", f"run.name={name}"]
        drive(load_config("toy_sdxl", [*TINY, *common, *overrides]), open_ports, QUIET)
    roots = [folder / name for name in arms]
    return build_report(roots, folder / "both.html", OPTIONS, track=True, console=QUIET), roots


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_loads_without_errors_or_network_and_fits_its_width(runs, browser, width, dark):
    browser.open(runs[0].path, width=width, dark=dark)
    for tab in range(2):
        browser.run(f"document.querySelectorAll('[role=tab]')[{tab}].click()")
        browser.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        assert browser.run("document.documentElement.scrollWidth") <= width
        wide = "[...document.querySelectorAll('.card,.figure,.pair,.verdict')].filter(e => e.getClientRects().length)"
        assert browser.run(
            f"{wide}.every(e => e.getBoundingClientRect().right <= {width} && e.scrollWidth <= e.clientWidth + 1)"
        )
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


def test_metrics_on_the_page_equal_the_metrics_of_the_run(runs, browser):
    report, roots = runs
    browser.open(report.path, width=1280)
    for index, root in enumerate(roots):
        *rows, gain = read_metrics(root / "metrics.jsonl")
        cards = f"[...document.querySelectorAll('#run-{index} [data-metric]')]"
        found = browser.run(f"{cards}.map(e => [e.dataset.metric, e.dataset.value, e.textContent])")
        shown = {name: (value, text) for name, value, text in found}
        for name in ("two_stream", "strided_judge"):
            assert float(shown[f"gain/{name}"][0]) == gain[f"gain/{name}"]
            assert shown[f"gain/{name}"][1].split()[0] == f"{gain[f'gain/{name}']:+.2f}"
        assert float(shown["drift"][0]) == pytest.approx(sum(r["drift/rms"] for r in rows) / len(rows))
        browser.run(f"document.getElementById('tab-{index}').click()")
        by_name = dict(browser.run(
            f"[...document.querySelectorAll('#run-{index} .chart')].flatMap(e => e.data.map(t => [t.name ?? '', t.y]))"
        ))  # fmt: skip
        assert by_name["rms drift"] == [r["drift/rms"] for r in rows]
        assert by_name["rollout"] == [r["time/rollout"] for r in rows]
        normaliser = read_run(root).normalisers["strided_judge"]
        wanted = [(r["judge/strided_judge/mean"] - normaliser.mean) / normaliser.std for r in rows]
        assert by_name["judge strided_judge"] == pytest.approx(wanted)


def test_a_slider_moves_the_edge_between_base_and_tuned_by_mouse_and_keyboard(runs, browser):
    browser.open(runs[0].path, width=1280)
    clip = "getComputedStyle(document.querySelector('.wipe .over')).clipPath"
    assert browser.run(clip) == "inset(0px 0px 0px 50%)"
    browser.run("document.querySelector('.wipe input').focus()")
    browser.press("ArrowRight")
    assert browser.run(clip) == "inset(0px 0px 0px 51%)"
    browser.press("Home")
    assert browser.run(clip) == "inset(0px 0px 0px 0%)"
    browser.run("document.querySelector('.wipe').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = browser.run(
        "(b => [b.left, b.top, b.width, b.height])(document.querySelector('.wipe').getBoundingClientRect())"
    )
    browser.click(box[0] + 0.8 * box[2], box[1] + 0.5 * box[3])
    cut = float(re.search(r"([\d.]+)%", browser.run(clip)).group(1))
    assert cut == pytest.approx(80, abs=6), "the thumb has a width, so the edge is not quite under the pointer"
    assert browser.run("document.querySelector('.wipe input').labels[0].textContent").startswith(
        "Visible share of the base"
    )


def test_tabs_follow_the_arrow_keys_and_charts_read_out_their_values(runs, browser):
    browser.open(runs[0].path, width=1280)
    browser.run("document.getElementById('tab-0').focus()")
    browser.press("ArrowRight")
    assert browser.run("[document.getElementById('run-0').hidden, document.getElementById('run-1').hidden]") == [
        True,
        False,
    ]
    assert browser.run("document.activeElement.id") == "tab-1"
    browser.run("document.querySelector('#run-1 [data-chart]').focus()")
    browser.press("Home")
    first = browser.run("document.querySelector('#run-1 .read').textContent")
    assert first.startswith("iteration 1: reward two_stream ")
    assert browser.run("document.querySelectorAll('#run-1 .hoverlayer .legend, #run-1 .hoverlayer .hovertext').length")
    browser.press("ArrowRight")
    assert browser.run("document.querySelector('#run-1 .read').textContent").startswith("iteration 2: ")


def test_every_chart_is_reached_by_tab_and_read_out_point_by_point(runs, browser):
    browser.open(runs[0].path, width=1280)
    for index in range(browser.run("document.querySelectorAll('#run-0 .chart').length")):
        chart = f"document.querySelectorAll('#run-0 .chart')[{index}]"
        browser.run(f"{chart}.focus()")
        assert browser.run(f"document.activeElement === {chart} && {chart}.getAttribute('aria-label').length > 9")
        said = []
        for key in ("Home", "End"):
            browser.press(key)
            said.append(browser.run(f"{chart}.nextElementSibling.textContent"))
        assert all(re.search(r"\d", text) for text in said), said
    assert browser.complaints == []


def test_pointing_at_a_chart_reads_its_value_out(runs, browser):
    browser.open(runs[0].path, width=1280)
    chart = "document.querySelector('#run-0 .chart')"
    browser.run(f"{chart}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    left, top, width, height = browser.run(
        f"(b => [b.left, b.top, b.width, b.height])({chart}.querySelector('.nsewdrag').getBoundingClientRect())"
    )
    for share in (0.98, 0.99):  # the first movement enters the chart, the second finds its hovered point
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + share * width, y=top + height / 2)
        browser.run("new Promise(requestAnimationFrame)")
    browser.run(f"new Promise(done => {chart}._hoverdata ? done() : {chart}.once('plotly_hover', done))")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + 0.985 * width, y=top + height / 2)
    assert browser.run(f"{chart}.nextElementSibling.textContent").startswith("iteration 3: ")


def test_charts_take_the_colours_of_the_readers_scheme(runs, browser):
    for dark, colours in ((False, LIGHT), (True, DARK)):
        browser.open(runs[0].path, width=1280, dark=dark)
        assert browser.run("document.querySelector('#run-0 .chart').data[0].line.color") == colours["tone-0"]
        assert browser.run("getComputedStyle(document.documentElement).getPropertyValue('--ink')") == colours["ink"]


def test_images_are_sorted_worst_first_and_can_be_reversed(runs, browser):
    browser.open(runs[0].path, width=1280)
    texts = "[...document.querySelectorAll('#run-0 .pair .gain')].map(e => e.textContent)"
    gains = f"{texts}.map(text => parseFloat(text.match(/[-+][\\d.]+/)[0]))"
    worst = browser.run(gains)
    wanted = sorted(round(pair.gain, 2) for pair in runs[0].views[0].gallery.pairs)
    assert worst == pytest.approx(wanted) and worst == sorted(worst)
    browser.run("document.querySelector('#run-0 [data-order=best]').click()")
    assert browser.run(gains) == worst[::-1]


def test_images_in_the_page_equal_the_runs_and_are_scored_as_in_training(runs):
    report, roots = runs
    view = report.views[1]
    config = read_run_config(roots[1])
    pool, rewards = LocalRollouts(config, device="cpu"), LocalRewards(config, device="cpu")
    checkpoint = CheckpointStore(roots[1] / "checkpoints", keep=3).newest()
    assert checkpoint is not None and view.gallery.iteration == checkpoint.iteration == 3
    from safetensors.torch import load_file

    from acpo_dist.core.weights import make_bundle
    from acpo_dist.data.prompts import load_prompts, sample_prompts

    groups = sample_prompts(
        load_prompts("toy", "prompt"), iteration=0, run_seed=0, stream="report", num_prompts=2, samples_per_prompt=2
    )
    ids = [plan.sample_id for group in groups for plan in group.samples]
    for which in ("base", "tuned"):
        if which == "tuned":
            pool.load(make_bundle(3, load_file(checkpoint.learner_folder / "policy.safetensors")))
        handles = pool.generate(groups)
        images, scores = pool.images(handles, ids), rewards.score(handles, ["two_stream", "strided_judge"])
        for index, sample_id in enumerate(ids):
            sample = getattr(view.gallery.pairs[index], which)
            kept = torch.from_numpy(np.asarray(Image.open(sample.file)).copy()).permute(2, 0, 1)
            assert torch.equal(kept, images[index])
            # Convolutions round differently for other memory layouts of the same pixels: some 1e-6 of a score near 1.
            assert sample.scores == {name: pytest.approx(scores[name][sample_id], abs=1e-5) for name in scores}
    # The page holds the same bytes, losslessly.
    page = report.path.read_text()
    inside = [base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([A-Za-z0-9+/=]+)"', page)]
    assert len(inside) == 16


def test_drift_by_timestep_is_the_runs_own_where_it_was_recorded_at_every_iteration(runs):
    drift, rows = runs[0].views[0].drift, read_metrics(runs[1][0] / "metrics.jsonl")[:3]
    assert list(drift.iterations) == [1, 2, 3] and list(drift.timesteps) == [125, 375, 625, 875]
    assert drift.space == "v" and "during training" in drift.source
    assert [list(values) for values in drift.values] == [[r[f"drift/at/{t}"] for r in rows] for t in drift.timesteps]


def test_drift_by_timestep_is_measured_from_checkpoints_otherwise(runs):
    drift, trained = runs[0].views[1].drift, read_metrics(runs[1][1] / "metrics.jsonl")
    assert not [name for row in trained for name in row if name.startswith("drift/at/")]
    assert list(drift.iterations) == [2, 3] and drift.space == "v"
    flat = [value for values in drift.values for value in values]
    assert len(flat) == 24 and all(value is not None and value > 0 for value in flat)


def test_a_second_report_draws_nothing_again(runs, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a model was opened")

    monkeypatch.setattr("acpo_dist.analysis.report.sample_renderer.open_rollouts", refuse)
    report, roots = runs
    again = build_report(roots, report.path.with_name("again.html"), OPTIONS, track=False, console=QUIET)
    assert [v.gallery for v in again.views] == [v.gallery for v in report.views]
    assert [v.drift for v in again.views] == [v.drift for v in report.views]


def test_the_report_of_a_run_without_checkpoints_lists_what_is_missing(tmp_path, monkeypatch, capsys):
    root = make_run(tmp_path / "run", [row(0, reward=0.5, judge=0.4, drift=0.1, **{"learner/skipped_steps": 2.0})])
    with (root / "metrics.jsonl").open("a") as file:
        file.write("torn")
    monkeypatch.setattr(sys, "argv", ["acpo", "report", str(root), "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["report"] == str(root / "report.html") and answer["runs"][0]["images"] == []
    page = unescape((root / "report.html").read_text())
    for words in ("1 unreadable line", "2 optimiser step", "No complete checkpoint", "Gains by iteration are unknown"):
        assert words in page and any(words in note for note in answer["runs"][0]["notes"])


def test_an_unreachable_mlflow_is_reported_and_the_report_is_kept(tmp_path, capsys):
    root = make_run(
        tmp_path / "run", [row(0, reward=0.5, judge=0.4, drift=0.1)], "tracking.mlflow_uri=http://127.0.0.1:9"
    )
    (root / "mlflow").mkdir()
    (root / "mlflow" / "run_id").write_text("abc")
    report = build_report([root], None, None, track=True, console=Console())
    assert report.tracked == {"toy-sdxl": False} and report.path.is_file()
    assert "not added to MLflow: MLflow at http://127.0.0.1:9 cannot be used" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize("at", ["7", "newest"])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(runs, at):
    from acpo_dist.core.errors import UsageError

    with pytest.raises(UsageError, match="found 2, 3" if at == "7" else "export, last, best"):
        build_report(runs[1][:1], None, GalleryOptions(prompts=1, per_prompt=1, at=at), track=False, console=QUIET)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_curves_have_enough_contrast_on_page_and_card(colours):
    assert colours.keys() == LIGHT.keys() and len(set(colours.values())) == len(colours)
    for name in (name for name in colours if name.startswith("tone-") or name in ("ink", "soft", "good", "bad")):
        for ground in ("page", "card"):
            low, high = sorted((luminance(colours[name]), luminance(colours[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


def luminance(colour):
    """Relative luminance of an sRGB colour, from 0 to 1. Source: WCAG 2.2."""
    shares = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
