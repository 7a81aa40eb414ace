"""The table of docs/reliability.md: how often each fault was injected and survived, from the log of `make soak`.

python -m tests.soak.matrix runs/soak.jsonl >> page.md
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.soak.processes import PHASES

COLUMNS = ("fault", "role", "phase", "backend", "injected", "survived", "seeds")


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per fault, role, phase and backend; a run with a problem counts against each of its faults."""
    injected: Counter[tuple[str, str, int, str]] = Counter()
    survived: Counter[tuple[str, str, int, str]] = Counter()
    seeds: defaultdict[tuple[str, str, int, str], set[int]] = defaultdict(set)
    for record in records:
        for one in record["injections"]:
            if one["done"]:
                key = one["fault"], one["role"], PHASES.index(one["phase"]), record["backend"]
                injected[key] += 1
                survived[key] += not record["problems"]
                seeds[key].add(record["seed"])
    return [
        {
            "fault": key[0], "role": key[1], "phase": PHASES[key[2]], "backend": key[3], "injected": injected[key],
            "survived": survived[key], "seeds": ", ".join(map(str, sorted(seeds[key]))),
        }
        for key in sorted(injected)
    ]  # fmt: skip


def render(records: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([str(row[name]) for name in COLUMNS] for row in rows_of(records))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Records of logs."""
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.stdout.write(render(read(map(Path, sys.argv[1:]))))
