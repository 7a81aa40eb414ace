"""Disturb small runs at random: `make soak ARGS="--minutes 10 --seed 7"`."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.cases import KINDS, draw
from tests.soak.punish import punish, twin


def main() -> int:
    """Run cases until the time is up; returns the number of cases with problems."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case; each next case has the next seed")
    parser.add_argument("--cases", type=int, default=1000, help="largest number of cases")
    parser.add_argument("--minutes", type=float, default=10.0, help="no case starts after this time")
    parser.add_argument("--kind", default="any", choices=["any", "all", *KINDS])
    parser.add_argument("--log", type=Path, default=Path("runs/soak.jsonl"), help="file that results are added to")
    parser.add_argument("--twin", type=Path, help="file with the metrics of the undisturbed run; made if it is missing")
    given = parser.parse_args()
    given.log.parent.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="soak"))
    started, failed = time.monotonic(), 0
    if given.twin is not None and given.twin.exists():
        expected = json.loads(given.twin.read_text())
    else:
        expected = twin(root)
        if given.twin is not None:
            given.twin.write_text(json.dumps(expected))
    for seed in range(given.seed, given.seed + given.cases):
        if time.monotonic() - started > 60 * given.minutes:
            break
        case = draw(seed, given.kind)
        record = {"kind": given.kind} | punish(case, root / str(seed), expected)
        with given.log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        failed += bool(record["problems"])
        done = [f"{one.fault} {one.role} {one.phase}" for one in case.injections if one.done]
        sys.stdout.write(f"seed {seed}: {record['seconds']:.0f} s, {case.backend}, {', '.join(done) or 'nothing'}\n")
        for problem in record["problems"]:
            sys.stdout.write(f"  PROBLEM {problem}\n")
        sys.stdout.flush()
        if not record["problems"]:
            shutil.rmtree(root / str(seed))
    if not failed:
        shutil.rmtree(root)
    else:
        sys.stdout.write(f"{failed} cases with problems; their folders are in {root}\n")
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(main())
