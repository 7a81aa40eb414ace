"""The punisher itself: a seed decides a case, what is wrong is found, and its log becomes the table of the page."""

import json
import random
from collections import Counter
from itertools import product
from pathlib import Path

from tests.soak.cases import GROUPS, ITERATIONS, Combination, again, draw, survived
from tests.soak.checks import compare, ending, folder_left
from tests.soak.faults import SIGNALS, damage
from tests.soak.matrix import read, render, rows_of
from tests.soak.processes import PHASES, ROLES, phase_of


def test_a_seed_decides_a_case_whose_faults_are_in_the_order_of_their_phases():
    for seed in range(100):
        case = draw(seed)
        assert case is not None and case == draw(seed) and case.injections
        due = [(one.after, PHASES.index(one.phase)) for one in case.injections]
        assert due == sorted(due) and all(0 <= after <= ITERATIONS + 1 for after, _ in due)
        injections = [one.to_mapping() | {"done": True} for one in case.injections]
        record = {"seed": seed, "backend": case.backend, "overrides": case.overrides, "injections": injections}
        assert again(record) == case


def test_cases_go_on_until_every_combination_of_fault_role_and_phase_was_survived_often_enough():
    counts: Counter[Combination] = Counter()
    seed = 0

    def wanted(one: Combination) -> bool:
        return counts[one] < 3

    while (case := draw(seed, wanted)) is not None:
        record = {"backend": case.backend, "injections": [one.to_mapping() for one in case.injections], "problems": []}
        for index, one in enumerate(record["injections"]):
            # The phase of one fault was over before it was seen.
            one["done"] = seed % 7 > 0 or index > 0
        counts.update(survived([record]))
        seed += 1
    assert set(counts.values()) == {3} and counts.keys() == {one for group in GROUPS for one in group}
    assert {(one.fault, one.role) for one in counts} >= set(product(SIGNALS, ROLES))


def test_phases_are_told_from_process_titles_and_the_run_folder(tmp_path):
    def seen(*titles: str) -> str:
        return phase_of(dict(enumerate(titles)), tmp_path, ITERATIONS)

    assert seen("python") == "start" and seen("ray::LearnerActor.build") == "loading"
    assert seen("ray::LearnerActor", "ray::RolloutActor.generate") == "calibration"
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n')
    assert seen("python") == "iterating" and seen("ray::IDLE") == "start"
    assert seen("ray::LearnerActor", "ray::RolloutActor.generate") == "drawing"
    assert seen("ray::LearnerActor.train") == "learning" and seen("ray::LearnerActor") == "scoring"
    assert seen("ray::LearnerActor.export") == "publishing"
    (tmp_path / "checkpoints" / ".000002.partial").mkdir(parents=True)
    assert seen("python") == "saving"
    (tmp_path / "export").mkdir()
    assert seen("python") == "export"


def test_a_traceback_a_silent_end_and_a_command_that_is_not_named_are_problems():
    message = "StorageError: /run can no longer be written: No space left on device.\n"
    assert ending(0, "done", signalled=False) == [] and ending(1, f"iteration 1/4\n{message}", signalled=False) == []
    assert ending(1, "Traceback (most recent call last):\n" + message, signalled=False) != []
    assert ending(1, "iteration 1/4", signalled=False) != [] and ending(-9, "", signalled=False) != []
    assert ending(-9, "", signalled=True) == []
    assert ending(143, "terminated; continue with `acpo train`", signalled=True) == []
    assert ending(143, "", signalled=True) != []
    assert ending(-15, "", signalled=True) == [] and ending(-15, "iteration 1/4", signalled=True) != []


def test_metrics_that_differ_or_are_there_twice_are_problems():
    rows = [{"iteration": index, "drift/rms": 0.1 + index} for index in range(3)]
    near = [row | {"drift/rms": row["drift/rms"] * (1 + 1e-5)} for row in rows]
    assert compare(rows, rows, exact=True) == [] and compare(near, rows, exact=False) == []
    assert compare(near, rows, exact=True) != [] and compare([*rows, rows[-1]], rows, exact=True) != []
    assert compare(rows[:2], rows, exact=False) != []


def test_a_damaged_checkpoint_and_what_is_left_of_a_run_are_problems(tmp_path):
    newest = tmp_path / "checkpoints" / "000002"
    newest.mkdir(parents=True)
    (newest / "state.json").write_text("{}" * 50)
    assert damage(tmp_path, random.Random(0)) == "checkpoints/000002/state.json"
    assert (newest / "state.json").read_text() != "{}" * 50
    (tmp_path / "resolved.yaml.tmp").touch()
    found = " ".join(folder_left(tmp_path))
    assert all(part in found for part in ("resolved.yaml.tmp", "000002", "no export"))


def test_the_table_counts_what_was_injected_and_survived_with_its_seeds():
    def record(seed: int, *, done: bool = True, problems: tuple[str, ...] = ()) -> dict:
        one = {"fault": "SIGKILL", "role": "learner", "phase": "learning", "done": done}
        return {"seed": seed, "backend": "ray", "injections": [one], "problems": list(problems)}

    records = [record(1), record(2, problems=("hung",)), record(3, done=False), record(4)]
    (row,) = rows_of(records)
    assert (row["injected"], row["survived"], row["seeds"]) == (3, 2, "1, 2, 4")
    assert "| SIGKILL | learner | learning | ray | 3 | 2 | 1, 2, 4 |" in render(json.loads(json.dumps(records)))


def test_the_table_of_the_page_is_that_of_its_log():
    docs = Path(__file__).resolve().parents[2] / "docs"
    assert render(read([docs / "evidence/soak.jsonl"])) in (docs / "reliability.md").read_text(encoding="utf-8")
