"""The key metrics during a run: in its own terminal, and from another process."""

import io
import json
import sys
import threading
from contextlib import ExitStack

import pytest
import rich.console

from acpo_dist.analysis.report.follow import Follower, follow, show_until_end
from acpo_dist.analysis.report.record import read_run
from acpo_dist.cli.app import main
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.panel import SIGMA, LivePanel, clock, spark
from acpo_dist.training.run_lock import LOCK_FILE, held
from tests.helpers.runs import make_run, row

ROWS = [row(i, reward=0.5 + 0.1 * i, judge=0.4, drift=0.1 + 0.01 * i, **{"drift/budget": 0.3}) for i in range(4)]


def terminal(**options):
    stream = io.StringIO()
    return stream, rich.console.Console(file=stream, force_terminal=True, width=100, **options)


def shown(panel):
    stream, console = terminal(color_system=None)
    console.print(panel)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"), ([1, None, 3], "▁ █"), ([2, 2], "▁▁"), ([float("nan")], ""), ([], "")],
)
def test_a_spark_line_spans_minimum_to_maximum(values, wanted):
    assert spark(values) == wanted


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (65, "1 min 05 s"), (3700, "1 h 01 min")])
def test_times_are_for_people(seconds, text):
    assert clock(seconds) == text


def test_the_panel_shows_gains_drift_guard_phases_and_what_is_left():
    panel = LivePanel("mine")
    for each in ROWS:
        panel.add(each["iteration"] + 1, 10, each | {"reward/two_stream/gain": each["iteration"] / 2})
    text = shown(panel)
    assert "mine · iteration 4/10 · 40% · 2.0 s each · 12 s left" in text
    assert f"+1.50 {SIGMA}" in text and "▁▃▆█" in text
    assert "+0 since iteration 1" in text, "a judge whose gain is not known shows its raw mean"
    assert "0.13" in text and "of 0.3 (43%)" in text
    assert "36%" in text and "nearest: drift" in text and "rollout 1.0 · learn 0.8" in text


def test_a_rule_over_its_limit_and_a_lowered_reward_are_shown():
    panel = LivePanel()
    panel.add(1, 2, row(0, reward=1, judge=1, drift=0.5, **{"guard/drift": 1.4, "guard/reward_scale": 0.5}))
    text = shown(panel)
    assert "140%" in text and "OVER: drift" in text and "reward weights at 0.5" in text


def test_on_a_terminal_the_panel_is_seen_within_phases_and_stays_at_the_end():
    stream, console = terminal()
    live = Console(live=True, rich_console=console)
    live.iteration(1, 2, ROWS[0])
    assert stream.getvalue() == ""
    with live.phase("rollout", 4) as advance:
        advance(4)
    assert "iteration 1/2" in stream.getvalue() and "rollout" in stream.getvalue()
    live.iteration(2, 2, ROWS[1])
    assert "iteration 2/2" in stream.getvalue()
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h"), "the cursor is back"


def test_the_panel_of_a_run_that_the_guard_stops_stays_on_the_screen():
    stream, console = terminal()
    live = Console(live=True, rich_console=console)
    live.iteration(1, 9, ROWS[0])
    assert stream.getvalue() == ""
    live.iteration(2, 9, ROWS[1], last=True)
    assert "iteration 2/9" in stream.getvalue()


def test_another_run_on_the_same_console_starts_afresh():
    panel = LivePanel()
    for iteration in (1, 2, 1):
        panel.add(iteration, 2, ROWS[iteration])
    assert "iteration 1/2" in shown(panel) and "▁█" not in shown(panel)


def test_without_a_terminal_the_lines_stay_as_they_are(capsys):
    Console(live=True).iteration(1, 2, ROWS[0])
    assert capsys.readouterr().err.startswith("iteration 1/2  reward/two_stream/mean 0.5")


def test_a_follower_waits_for_whole_lines_and_starts_again_when_the_file_was_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.new_rows() == []
    path.write_text('{"iteration": 0}\n{"iterat')
    assert follower.new_rows() == [{"iteration": 0}]
    path.write_text('{"iteration": 0}\n{"iteration": 1}\nbroken\n')
    assert follower.new_rows() == [{"iteration": 1}] and follower.broken == 1
    path.write_text('{"iteration": 0}\n')
    assert follower.new_rows() == [{"iteration": 0}]


def test_watching_ends_with_the_run_and_shows_gains_in_base_units(tmp_path):
    root = make_run(tmp_path / "run", ROWS[:1], "run.iterations=4", checkpoint=1)
    looked = threading.Event()

    def write_the_rest(seconds):
        with (root / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(each) + "\n" for each in ROWS[1:])
            file.write(json.dumps({"iteration": 4, "gain/two_stream": 0.5}) + "\n")
        looked.set()

    looks = list(follow(root, wait_s=60, sleep=write_the_rest))
    assert looked.is_set() and [len(rows) for rows, _, _ in looks] == [1, 3] and looks[-1][2]
    assert looks[-1][0][-1]["reward/two_stream/gain"] == pytest.approx(1.5)


def test_following_ends_with_the_process_that_holds_the_run_lock(tmp_path):
    root = make_run(tmp_path / "run", ROWS[:2], "run.iterations=4")
    stream, console = terminal()
    with ExitStack() as driving:
        driving.enter_context(held(root))
        dead = json.loads((root / LOCK_FILE).read_text()) | {"started": 0.0}
        looks = follow(root, wait_s=600, sleep=lambda seconds: driving.close())
        assert [len(rows) for rows, _, _ in looks] == [2, 0, 0, 0]
    (root / LOCK_FILE).write_text(json.dumps(dead))
    show_until_end(read_run(root), Console(rich_console=console), wait_s=600)
    assert "its process has ended" in stream.getvalue() and "iteration 2/4" in stream.getvalue()


def test_a_silent_run_is_given_up_after_the_wait_with_a_message(tmp_path):
    root = make_run(tmp_path / "run", ROWS[:2], "run.iterations=4")
    stream, console = terminal()
    show_until_end(read_run(root), Console(rich_console=console), wait_s=0.0)
    assert "no new iteration for" in stream.getvalue() and "iteration 2/4" in stream.getvalue()


def test_watch_prints_where_a_run_is_once_or_as_json(tmp_path, monkeypatch, capsys):
    root = make_run(tmp_path / "run", ROWS, checkpoint=4, gains={"two_stream": 0.5})
    monkeypatch.setattr(sys, "argv", ["acpo", "follow", str(root), "--once"])
    with pytest.raises(SystemExit):
        main()
        sys.exit(0)
    assert "iteration 4/4" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["acpo", "follow", str(root), "--json"])
    with pytest.raises(SystemExit):
        main()
        sys.exit(0)
    assert json.loads(capsys.readouterr().out)["gains"] == {"two_stream": 0.5}
