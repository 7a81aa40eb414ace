"""Run folders as written by `acpo train`, without training, and what undisturbed runs have in common."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from acpo_dist.config.load import load_config
from acpo_dist.core.sizes import size_text
from acpo_dist.tracking.jsonl import read_metrics

CLOCKS = ("time/", "idle/", "reward_pool/")
"""Prefixes of the metrics that differ between two undisturbed runs of one configuration."""

PLAIN = ["run.iterations=3", "checkpoint.every=1", "checkpoint.keep=9", "run.name=plain-toy"]
"""Overrides of the run that tests share (`plain_run`), besides TINY."""

NORMALISERS = {
    "two_stream": {"mean": 0.5, "std": 0.2, "sign": 1, "target": None},
    "strided_judge": {"mean": 0.4, "std": 0.1, "sign": 1, "target": None},
}


def results(root: Path) -> list[dict[str, Any]]:
    """Recorded metrics by iteration, without those of `CLOCKS`."""
    rows = read_metrics(root / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in rows]


def copy_run(run: Path, root: Path, *, newest: int | None = None) -> Path:
    """Copy a run; with `newest`, as a machine leaves it that died after this checkpoint and before the next."""
    shutil.copytree(run, root)
    for path in (root / "checkpoints").glob("[0-9]*"):
        if newest is not None and int(path.name) > newest:
            shutil.rmtree(path)
    return root


def require_drift(rows: list[dict[str, Any]], *, rounding: float = 0.0) -> None:
    """Require finite metrics of a run of two or more iterations, which first moves the policy off the base model."""
    assert all(math.isfinite(value) for row in rows for value in row.values())
    # Policy and base are one network at first; the first update moves them apart.
    assert 0 <= rows[0]["drift/rms"] <= rounding < rows[1]["drift/rms"]


def use_everywhere(done: Callable[..., str], root: Path, out: Path, model: list[str], *backend: str) -> None:
    """Evaluate, report, draw and plan a run on the toy that `done`, a runner of `acpo`, must finish.

    Args:
        done: runs `acpo` with these arguments and returns its text.
        root: the run.
        out: folder for what is written.
        model: overrides of the model, for `acpo plan`.
        backend: options of `acpo eval`.
    """
    done("eval", str(root), "--compare", "base", "--suite", "toy", "--limit", "6", "--judges", "two_stream", "--drift",
         "4", "--features", "low-pass:4", "--out", str(out / "eval"), *backend)  # fmt: skip
    report = json.loads((out / "eval" / "evaluation.json").read_text())
    assert report["num_missing"] == 0 and report["drift"]["rms"] >= 0
    done("report", str(root), "--out", str(out / "report.html"), "--prompts", "4")
    done("generate", str(root), "--prompt", "a red circle", "--steps", "2", "--out", str(out / "drawn"))
    sizes = load_config("toy_sdxl", model).model.sizes
    planned = done("plan", "toy_sdxl", *model)
    # A plan for several sizes names the largest, whose memory and time it gives.
    assert len(sizes) == 1 or any(size_text(size) in planned for size, _ in sizes)


def row(iteration: int, *, reward: float, judge: float, drift: float, **more: float | None) -> dict[str, Any]:
    """One line of `metrics.jsonl`."""
    return {
        "iteration": iteration, "reward/two_stream/mean": reward, "judge/strided_judge/mean": judge, "drift/rms": drift,
        "anchor/weight": 2.0, "time/iteration": 2.0, "time/rollout": 1.0, "time/learn": 0.75,
        "guard/drift": drift / 0.36, "guard/hacking_gap": 0.1, "guard/reward_scale": 1.0,
        "guard/best_iteration": 0.0, **more,
    }  # fmt: skip


def make_run(
    root: Path, rows: list[dict[str, Any]], *overrides: str, gains: Mapping[str, float] | None = None,
    checkpoint: int | None = None, guard: list[dict[str, Any]] | None = None,
) -> Path:  # fmt: skip
    """Write the folder; a checkpoint holds state and manifest, but no weights."""
    root.mkdir(parents=True)
    config = load_config("toy_sdxl", [f"run.dir={root}", f"run.iterations={len(rows)}", *overrides])
    (root / "resolved.yaml").write_text(yaml.safe_dump(config.to_mapping()))
    lines = [*rows, *([{"iteration": len(rows), **{f"gain/{k}": v for k, v in gains.items()}}] if gains else [])]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if checkpoint is not None:
        folder = root / "checkpoints" / f"{checkpoint:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"iteration": checkpoint, "normalisers": NORMALISERS}))
        (folder / "manifest.json").write_text(json.dumps({"files": {}}))
    if guard:
        (root / "guard.jsonl").write_text("".join(json.dumps(event) + "\n" for event in guard))
    return root
