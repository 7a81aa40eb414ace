"""Evaluate the guard on the toy SDXL: whether it stops reward hacking in time and lets a regular run continue.

    .venv/bin/python benchmarks/guard.py [--seeds 0 1 2] [--only fast slow acpo] [--samples 96] [KEY=VALUE ...]

Arms: `fast` is toy_sdxl without its anchor, `slow` is toy_draft, which learns an eighth as fast; both follow the reward
alone, at a rate that does not fall, until it is hacked. `acpo` is toy_sdxl as it is shipped. All run with
`guard.action=roll_back`. The guard sees judges, images and drift; the oracle only grades: it looks at every published
version (`--every` of the slow arm) on the same prompts and seeds. It has fallen below the base's where its error or its
caption accuracy is worse by more than `--sigmas` standard errors of the mean paired difference (it looks often),
or templates are lost (a collapse onto one clean template lowers the error). A twin without a guard goes on until then.
One JSON line per run, then a table in Markdown; `--table FILE...` reads lines.
"""

import os

# Before torch is imported: two torch threads on contended cores are tens of times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from algorithms import Watched
from safetensors.torch import load_file

from acpo_dist.config.load import load_config
from acpo_dist.core.weights import make_bundle
from acpo_dist.data.prompts import load_prompts
from acpo_dist.data.toy.oracle import nearest_template
from acpo_dist.data.toy.world import caption_index, captions
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive

ARMS = {
    # Drift is measured in the units of the budget in all of them.
    "fast": (
        "toy_sdxl",
        ["algorithm.anchor.weight=0", "algorithm.anchor.budget=null", "learner.lr_decay_ratio=0", "run.iterations=20"],
    ),
    "slow": ("toy_draft", ["learner.lr_decay_ratio=0", "run.iterations=60"]),
    "acpo": ("toy_sdxl", []),
}
COLUMNS = (
    "arm", "seed", "warned after", "stopped after", "by", "oracle falls at", "kept", "error, kept / base",
    "captions, kept / base",
)  # fmt: skip
ENTROPY = 0.25
"""Loss of template entropy, in nats, that counts as a fall; without a collapse it varies by about 0.03 on the same
seeds."""


class FallenError(Exception):
    """Ends the twin run once the oracle has fallen."""


def main() -> None:
    """Evaluate every arm and seed, or read existing results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--every", type=int, default=4, help="versions of the slow arm between looks of the oracle")
    parser.add_argument("--every-acpo", type=int, default=30, help="the same of the acpo arm")
    parser.add_argument("--longest", type=int, default=6, help="looks at a twin beyond its guarded run at most")
    parser.add_argument("--sigmas", type=float, default=3.0)
    parser.add_argument("--table", type=Path, nargs="+", default=None, help="only read these files of JSON lines")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    if options.table:
        lines = [
            json.loads(line) for path in options.table for line in path.read_text().splitlines() if line[:1] == "{"
        ]
    else:
        lines = [grade(arm, seed, options) for seed in options.seeds for arm in options.only]
    sys.stdout.write(make_table(lines))


@dataclass(frozen=True)
class Look:
    """Oracle measurements of one version."""

    errors: torch.Tensor
    """Squared distance of each image to the nearest clean template."""
    hits: torch.Tensor
    """1 if that template has the prompt's caption."""
    entropy: float
    """Entropy of the templates, in nats; low if few are drawn."""


class Oracle:
    """Evaluates versions on the same prompts and seeds, image by image."""

    def __init__(self, config, prompts, samples: int, sigmas: float) -> None:
        """Fix prompts and seeds."""
        self._groups = fixed_groups(config, prompts, samples, stream="evaluation")
        self._sigmas = sigmas
        self.looks: dict[int, Look] = {}

    def look(self, pool) -> Look:
        """Measure the version that the workers currently hold."""
        return self.measure(self.draw(pool))

    def draw(self, pool) -> torch.Tensor:
        """Draw the images of the version that the workers currently hold: uint8 (samples, 3, H, W)."""
        plans = [plan for group in self._groups for plan in group.samples]
        return pool.images(pool.generate(self._groups), [plan.sample_id for plan in plans])

    def measure(self, images: torch.Tensor) -> Look:
        """Compare images with the templates and their prompts."""
        ids, errors = nearest_template(images.float() / 255)
        position = {caption: index for index, caption in enumerate(captions())}
        wanted = torch.tensor([position[plan.prompt] for group in self._groups for plan in group.samples])
        share = torch.bincount(ids).double() / len(ids)
        entropy = -float(torch.special.xlogy(share, share).sum())
        return Look(errors=errors.double(), hits=(caption_index()[ids] == wanted).double(), entropy=entropy)

    def against_base(self, look: Look) -> dict[str, float]:
        """Ratios to the base, and how far each figure is on the wrong side in standard errors of the paired mean."""
        base = self.looks[0]
        return {
            "error": round(float(look.errors.mean() / base.errors.mean()), 3),
            "error_z": worse(look.errors - base.errors),
            "caption": round(float(look.hits.mean() / base.hits.mean()), 3),
            "caption_z": worse(base.hits - look.hits),
            "entropy_lost": round(base.entropy - look.entropy, 3),
        }

    def fallen(self, look: Look) -> bool:
        """Return whether a metric is below the base model's by more than its noise."""
        seen = self.against_base(look)
        return max(seen["error_z"], seen["caption_z"]) > self._sigmas or seen["entropy_lost"] > ENTROPY

    def first_fall(self) -> int | None:
        """Return the first version that has fallen."""
        return next((version for version in sorted(self.looks) if self.fallen(self.looks[version])), None)

    def history(self) -> dict[int, dict[str, float]]:
        """Return all measurements by version."""
        return {version: self.against_base(look) for version, look in sorted(self.looks.items())}


def worse(difference: torch.Tensor) -> float:
    """Return the mean in standard errors; 0 without differences."""
    spread = float(difference.std()) / len(difference) ** 0.5
    return round(float(difference.mean()) / spread, 2) if spread else 0.0


def grade(arm: str, seed: int, options) -> dict:
    """Execute a guarded run, and for a hacking arm also its twin without a guard."""
    started = time.process_time()
    every = {"fast": 1, "slow": options.every, "acpo": options.every_acpo}[arm]
    with tempfile.TemporaryDirectory() as folder:
        row, oracle = guarded(arm, seed, options, every, Path(folder) / "run")
        if arm != "acpo":
            twin = twin_of(arm, seed, options, every, Path(folder) / "twin", oracle)
            row |= {"oracle_falls_at": twin.first_fall(), "twin": twin.history()}
            row["published_fallen"] = [version for version, look in oracle.looks.items() if oracle.fallen(look)]
    row["cpu_seconds"] = round(time.process_time() - started, 1)
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()
    return row


def guarded(arm: str, seed: int, options, every: int, root: Path) -> tuple[dict, Oracle]:
    """Run with the guard, and return the result and the oracle's measurements."""
    config, oracle = prepare(arm, seed, options, root, "roll_back")
    kept: dict[str, float] = {}

    def at_end(config, ports, prompts) -> None:
        lines = decisions(root)
        if lines and lines[-1]["action"] == "roll_back":
            iteration = lines[-1]["best_iteration"]
            weights = load_file(root / f"checkpoints/{iteration:06d}/learner/policy.safetensors")
            ports.rollout.load(make_bundle(10**6, weights))
        else:
            iteration = config.run.iterations
        look = oracle.look(ports.rollout)
        kept.update(oracle.against_base(look), iteration=iteration, fallen=oracle.fallen(look))

    result = drive(config, watched(oracle, every, more=None), Console(quiet=True), at_end=at_end)
    lines = decisions(root)
    metrics = [row for row in read_metrics(root / "metrics.jsonl") if "drift/rms" in row]
    shares = [{k: v for k, v in row.items() if k.startswith("guard/") and "/" in k} for row in metrics]
    stopped = result.guard is not None
    return {
        "arm": arm, "seed": seed, "iterations": result.iterations, "stopped": stopped,
        "stopped_after": result.iterations if stopped else None,
        "reasons": [reason.rule for reason in result.guard.reasons if reason.level == "stop"] if result.guard else [],
        "text": result.guard.text if result.guard else "",
        "warned_first": lines[0]["iteration"] + 1 if lines else None,
        "warned_by": sorted({name for line in lines for name in line["raised"]}),
        "kept": kept, "looks": oracle.history(),
        "nearest": max(
            ((value, key[6:]) for row in shares for key, value in row.items()
             if key not in ("guard/reward_scale", "guard/best_iteration")), default=None,
        ),
        "drift": [round(row["drift/rms"], 3) for row in metrics],
        "probe": [
            round((sum(v for k, v in row.items() if k.startswith("drift/at/"))
                   / max(1, sum(k.startswith("drift/at/") for k in row))) ** 0.5, 3)
            for row in metrics
        ],
        "diversity_lost": [round(row.get("guard/diversity_lost", 0.0), 3) for row in metrics],
    }, oracle  # fmt: skip


def twin_of(arm: str, seed: int, options, every: int, root: Path, seen: Oracle) -> Oracle:
    """Execute the same run without a guard until the oracle falls; versions that are already measured are skipped."""
    config, oracle = prepare(arm, seed, options, root, "none")
    oracle.looks |= seen.looks
    if oracle.first_fall() is not None:
        return oracle
    try:
        drive(config, watched(oracle, every, more=options.longest), Console(quiet=True))
    except FallenError:
        pass
    return oracle


def prepare(arm: str, seed: int, options, root: Path, action: str):
    """Return configuration and a new oracle of one run."""
    source, extra = ARMS[arm]
    config = load_config(
        source,
        [f"run.seed={seed}", f"run.dir={root}", "tracking.mlflow=false", f"guard.action={action}", *extra,
         *options.overrides],
    )  # fmt: skip
    prompts = load_prompts(config.data.prompts, config.data.prompt_column)
    return config, Oracle(config, prompts, options.samples, options.sigmas)


def watched(oracle: Oracle, every: int, *, more: int | None):
    """In-process ports whose weight channel calls the oracle; a run ends at its fall or after `more` measurements."""
    before = len(oracle.looks)

    @contextmanager
    def opened(config, tracker):
        with open_ports(config, tracker) as ports:

            def evaluate(version: int) -> None:
                if version in oracle.looks:
                    return
                look = oracle.looks[version] = oracle.look(ports.rollout)
                sys.stderr.write(json.dumps({"version": version, **oracle.against_base(look)}) + "\n")
                if more is not None and (oracle.fallen(look) or len(oracle.looks) - before >= more):
                    raise FallenError

            yield replace(ports, weights=Watched(ports.weights, evaluate, every, config.run.iterations))

    return opened


def decisions(root: Path) -> list[dict]:
    """Return the decisions that the guard recorded."""
    path = root / "guard.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def make_table(lines: list[dict]) -> str:
    """Return Markdown, one row per run."""
    rows = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for line in sorted(lines, key=lambda line: (list(ARMS).index(line["arm"]), line["seed"])):
        falls, kept = line.get("oracle_falls_at"), line["kept"]
        cells = [
            line["arm"], line["seed"], line["warned_first"] or "never", line["stopped_after"] or "never",
            ", ".join(line["reasons"]) or "-",
            "-" if line["arm"] == "acpo" else falls if falls is not None else f"not by {max(map(int, line['twin']))}",
            kept["iteration"], f"{kept['error']:.2f}", f"{kept['caption']:.2f}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
