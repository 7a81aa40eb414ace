"""Disturb small runs at random: `make soak ARGS="--minutes 10 --seed 7"`."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.helpers import forked
from tests.soak.cases import Case, Combination, again, draw, survived
from tests.soak.matrix import read
from tests.soak.punish import Forks, punish, twin


def main() -> int:
    """Run cases until the time is up; returns the number of cases with problems."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case; each next case has the next seed")
    parser.add_argument("--cases", type=int, default=1000, help="largest number of cases")
    parser.add_argument("--minutes", type=float, default=10.0, help="no case starts after this time")
    parser.add_argument("--only", default="", help='combinations with these words, as in --only "SIGKILL learner ray"')
    parser.add_argument("--until", type=int, help="leave out combinations that the log has this often")
    parser.add_argument("--again", type=int, metavar="SEED", help="repeat this case of the log")
    parser.add_argument("--log", type=Path, default=Path("runs/soak.jsonl"), help="file that results are added to")
    parser.add_argument("--twin", type=Path, help="file with the metrics of the undisturbed run; made if it is missing")
    given = parser.parse_args()
    given.log.parent.mkdir(parents=True, exist_ok=True)
    given.log.touch()
    root = Path(tempfile.mkdtemp(prefix="soak"))
    started, failed = time.monotonic(), 0
    if given.twin is not None and given.twin.exists():
        expected = json.loads(given.twin.read_text())
    else:
        expected = twin(root)
        if given.twin is not None:
            given.twin.write_text(json.dumps(expected))
    with forked.serving(root) as (program, server):
        forked.wait_until_ready(program)
        for seed in range(given.seed, given.seed + (given.cases if given.again is None else 1)):
            case = _next(given, seed)
            if case is None or time.monotonic() - started > 60 * given.minutes:
                break
            record = punish(case, root / str(case.seed), expected, Forks(program, server))
            with given.log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            failed += bool(record["problems"])
            _print(record)
            if not record["problems"]:
                shutil.rmtree(root / str(case.seed))
    if not failed:
        shutil.rmtree(root)
    else:
        sys.stdout.write(f"{failed} cases with problems; their folders are in {root}\n")
    return min(failed, 100)


def _next(given: argparse.Namespace, seed: int) -> Case | None:
    records = read([given.log])
    if given.again is not None:
        return again(next(one for one in records if one["seed"] == given.again))
    counts, words = survived(records), set(given.only.split())

    def wanted(one: Combination) -> bool:
        return words <= set(str(one).split()) and (given.until is None or counts[one] < given.until)

    return draw(seed, wanted)


def _print(record: dict[str, Any]) -> None:
    done = [f"{one['fault']} {one['role']} {one['phase']}" for one in record["injections"] if one["done"]]
    missed = len(record["injections"]) - len(done)
    sys.stdout.write(
        f"seed {record['seed']}: {record['seconds']:.0f} s, {record['backend']}, {', '.join(done) or 'nothing'}"
        f"{f'; {missed} not injected' if missed else ''}\n"
    )
    for problem in record["problems"]:
        sys.stdout.write(f"  PROBLEM {problem}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
