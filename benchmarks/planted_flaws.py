"""What the guard sees of a reward with a planted flaw, and of a judge that shares it; false alarms of honest runs.

    .venv/bin/python benchmarks/planted_flaws.py --out runs/planted [--seeds 0 1 2] [--honest 10]

The reward is the toy's network plus a multiple (`STRENGTH`) of the size of a flaw (`_planted.py`): an orange tint, a
grid, a watermark in a corner. Arms: `acpo` is toy_sdxl as it is shipped (anchor, falling rate), `alone` follows the
reward alone at an eighth of its rate, which does not fall. Every run has two judges, the toy's own and one that rewards
the same flaw, and goes on after an alarm (`guard.action=warn`); its guard is then repeated on the recorded gains with
one judge at a time. The oracle (see `guard.py`) and the flaw are measured on the same prompts and seeds every `--every`
versions. A flaw is visible from 8/255 on. `honest` arms have the toy's own reward and judge, on three models. Finished
runs are kept in results.jsonl; writes planted.png.
"""

import os

# Before torch is imported: two torch threads on contended cores are tens of times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from _cells import Cells
from _planted import FLAWS
from guard import Oracle, decisions, watched

from acpo_dist.config.guard import GuardConfig
from acpo_dist.config.load import load_config
from acpo_dist.data.prompts import load_prompts
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.images import save_grid
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.guard.guard import Guard
from acpo_dist.training.guard.signals import Signals
from acpo_dist.training.run import drive

ARMS = {
    "acpo": [],
    "alone": [
        "algorithm.anchor.weight=0", "algorithm.anchor.budget=null", "learner.lr_decay_ratio=0",
        "learner.learning_rate=5.0e-4",
    ],
}  # fmt: skip
HONEST = ("toy_sdxl", "toy_sd15", "toy_flow")
JUDGES = {"own": ("own",), "sharing": ("sharing",), "both": ("own", "sharing")}
STRENGTH = {"tint": 20.0, "grid": 30.0, "watermark": 30.0}
"""Score per size of the flaw: a visible one earns 0.63 to 0.94."""
VISIBLE = 8 / 255
SHOWN = 12


def main() -> None:
    """Run what is missing, write the picture, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--flaws", nargs="*", default=list(FLAWS), choices=FLAWS)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--honest", type=int, default=10, help="honest runs, from seed 100 on")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells(options.out / "results.jsonl")
    for seed in options.seeds:
        for flaw in options.flaws:
            for arm in options.arms:
                cells.get(f"planted/{flaw}/{arm}/{seed}", lambda a=arm, f=flaw, s=seed: planted(a, f, s, options))
    for index in range(options.honest):
        source, seed = HONEST[index % len(HONEST)], 100 + index
        cells.get(f"honest/{source}/{seed}", lambda c=source, s=seed: honest(c, s, options))
    draw_picture(options.out)
    sys.stdout.write(planted_table(cells.of("planted")) + "\n" + honest_table(cells.of("honest")))


class FlawOracle(Oracle):
    """The oracle, and the size of every flaw in the images of a version."""

    def __init__(self, *args) -> None:
        """Fix prompts and seeds."""
        super().__init__(*args)
        self.images: list[torch.Tensor] = []
        self.sizes: dict[int, dict[str, float]] = {}

    def look(self, pool):
        """Measure the version that the workers currently hold."""
        images = self.draw(pool)
        self.sizes[len(self.images)] = {name: float(f(images.float() / 255).mean()) for name, f in FLAWS.items()}
        self.images.append(images[:SHOWN])
        return self.measure(images)


def planted(arm: str, flaw: str, seed: int, options) -> dict:
    """Train on a reward with this flaw; return oracle, flaw and when which rule would have stopped the run."""
    metric = {"type": "_planted:Planted", "flaw": flaw, "strength": STRENGTH[flaw]}
    judges = [{"type": "strided_judge", "name": "own"}, metric | {"name": "sharing", "network": "strided_judge"}]
    row, oracle, metrics, lines = run(
        "toy_sdxl", seed, options,
        [f"rewards.train={json.dumps([metric | {'name': 'planted'}])}", f"rewards.judges={json.dumps(judges)}",
         *ARMS[arm], *options.overrides],
    )  # fmt: skip
    torch.save(torch.cat([oracle.images[0], oracle.images[-1]]), options.out / f"{flaw}-{arm}-{seed}.pt")
    sizes = [oracle.sizes[at][flaw] - oracle.sizes[0][flaw] for at in sorted(oracle.sizes)]
    versions = sorted(oracle.looks)
    row["flaw"] = dict(zip(versions, (round(size, 4) for size in sizes), strict=True))
    row["visible_at"] = next((v for v, size in zip(versions, sizes, strict=True) if abs(size) > VISIBLE), None)
    shared = rises_of(lines, lambda rule: rule.partition("/")[0] in ("content_shift", "diversity_lost", "drift"))
    row["rises"] = {name: shared | replayed(metrics, judges, "planted") for name, judges in JUDGES.items()}
    row["gains"] = {
        name: round(metrics[-1][key], 2) for name, key in (
            ("reward", "reward/planted/gain"), ("own", "judge/own/gain"), ("sharing", "judge/sharing/gain")
        )
    }  # fmt: skip
    return row


def honest(source: str, seed: int, options) -> dict:
    """Train a shipped configuration as it is; return which rules rose and whether the oracle fell."""
    row, _, _, lines = run(source, seed, options, list(options.overrides), every=options.iterations)
    return row | {"rises": rises_of(lines, lambda _: True)}


def run(source: str, seed: int, options, extra: list[str], *, every: int | None = None):
    """Train in process with a guard that only warns; return the oracle's row, the oracle, metrics and decisions."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            source,
            [f"run.seed={seed}", f"run.dir={folder}/run", f"run.iterations={options.iterations}",
             "tracking.mlflow=false", "guard.action=warn", *extra],
        )  # fmt: skip
        oracle = FlawOracle(config, load_prompts(config.data.prompts, config.data.prompt_column), options.samples, 3.0)
        drive(config, watched(oracle, every or options.every, more=None), Console(quiet=True))
        root = Path(folder) / "run"
        metrics = [line for line in read_metrics(root / "metrics.jsonl") if "drift/rms" in line]
        lines = decisions(root)
    return {
        "oracle": oracle.history(), "falls_at": oracle.first_fall(), "drift": round(metrics[-1]["drift/rms"], 3),
        "nearest": max(
            (value, key[6:]) for line in metrics for key, value in line.items()
            if key.startswith("guard/") and key not in ("guard/reward_scale", "guard/best_iteration")
        ),
        "cpu_seconds": round(time.process_time() - started, 1),
    }, oracle, metrics, lines  # fmt: skip


def rises_of(lines: list[dict], wanted) -> dict[str, dict[str, int]]:
    """Return rule -> level -> iterations done when it first had this level, from recorded decisions."""
    found: dict[str, dict[str, int]] = {}
    for line in lines:
        for reason in line["reasons"]:
            if wanted(reason["rule"]):
                found.setdefault(reason["rule"], {}).setdefault(reason["level"], line["iteration"] + 1)
    return found


def replayed(metrics: list[dict], judges: tuple[str, ...], reward: str) -> dict[str, dict[str, int]]:
    """Repeat the rules on reward and judges with some of the judges, from the recorded gains."""
    guard, lines = Guard(GuardConfig(action="warn")), []
    for line in metrics:
        signals = Signals(
            reward_gains={reward: line[f"reward/{reward}/gain"]},
            judge_gains={name: line[f"judge/{name}/gain"] for name in judges},
        )
        lines.append(guard.update(line["iteration"], signals).to_mapping())
    return rises_of(lines, lambda _: True)


def draw_picture(out: Path) -> None:
    """Write planted.png: for every seed the base model, and the last weights of each of its runs."""
    rows, labels, last_seed = [], [], None
    for seed, arm, flaw in sorted(tuple(reversed(path.stem.split("-"))) for path in out.glob("*-*-*.pt")):
        base, last = torch.load(out / f"{flaw}-{arm}-{seed}.pt").split(SHOWN)
        if seed != last_seed:
            rows, labels, last_seed = [*rows, base], [*labels, f"seed {seed}: base"], seed
        rows, labels = [*rows, last], [*labels, f"{flaw}, {arm}"]
    if rows:
        save_grid(torch.cat(rows), out / "planted.png", columns=SHOWN, labels=labels, scale=2)


def planted_table(rows: dict[str, dict]) -> str:
    """Return Markdown: per run the flaw, the oracle, when drift would stop, and the first other rule by judges."""
    head = ("flaw", "arm", "seed", "drift", "flaw at the end", "visible at", "oracle falls at", "error, captions",
            "stops by drift", "else, own judge", "else, sharing judge", "else, both")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key, row in sorted(rows.items()):
        last = list(row["oracle"].values())[-1]
        size = 255 * list(row["flaw"].values())[-1]
        cells = [
            *key.split("/"), row["drift"], f"{size:+.0f}/255", row["visible_at"] or "never", row["falls_at"] or "never",
            f"{last['error']:.2f}, {last['caption']:.2f}",
            row["rises"]["both"].get("drift", {}).get("stop", "never"),
            *(first_of(row["rises"][name]) for name in JUDGES),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def first_of(rises: dict[str, dict[str, int]]) -> str:
    """Return the iteration and the rules, other than drift, that reached their stop limit first."""
    at = {rule: levels["stop"] for rule, levels in rises.items() if "stop" in levels and rule != "drift"}
    if not at:
        return "never"
    first = min(at.values())
    return f"{first}, " + " and ".join(f"`{rule}`" for rule, when in sorted(at.items()) if when == first)


def honest_table(rows: dict[str, dict]) -> str:
    """Return Markdown: per configuration the runs, false stops and warnings, and the nearest rule."""
    head = (
        "configuration",
        "runs",
        "oracle error",
        "oracle fell",
        "false stops",
        "false warnings",
        "nearest to a stop",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for source in HONEST:
        found = [row for key, row in rows.items() if key.startswith(source + "/")]
        if not found:
            continue
        errors = [list(row["oracle"].values())[-1]["error"] for row in found]
        stops = sum(any("stop" in levels for levels in row["rises"].values()) for row in found)
        warns = sum(bool(row["rises"]) for row in found)
        value, rule = max(tuple(row["nearest"]) for row in found)
        cells = [
            source, len(found), f"{min(errors):.2f} to {max(errors):.2f}",
            sum(row["falls_at"] is not None for row in found), stops, warns, f"`{rule}`, {value:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
