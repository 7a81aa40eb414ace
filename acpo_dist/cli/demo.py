"""`acpo demo`: base, reward-only and ACPO side by side on an embedded toy, on a local Ray cluster."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer, app

# Optimising the reward alone: no anchor, and the learning rate that raises the reward most.
_REWARD_ONLY = [
    "algorithm.anchor.weight=0", "algorithm.anchor.budget=null", "learner.learning_rate=8.0e-3",
    "learner.lr_decay_ratio=0",
]  # fmt: skip
MODELS = {"toy-sdxl": "demo", "toy-flow": "demo_flow"}
"""Configuration of the demo by embedded toy."""
ARMS = {"reward_only": _REWARD_ONLY, "acpo": []}
EVALUATION_SAMPLES = 480
COLUMNS = ("reward", "judge", "oracle_mse", "oracle_psnr", "caption_accuracy", "template_entropy", "drift")


@app.command("demo")
def demo(
    folder: Annotated[
        Path, typer.Option(help="Folder for runs, MLflow and the image; each demo writes a new subfolder.")
    ] = Path("runs"),
    model: Annotated[str, typer.Option(help=f"Embedded toy: {' or '.join(MODELS)}.")] = "toy-sdxl",
    seed: Annotated[int, typer.Option(help="Seed of training; evaluation prompts and seeds are derived from it.")] = 0,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Iterations per arm; by default those of the configuration.")
    ] = None,
    samples: Annotated[int, typer.Option(min=8, help="Evaluation samples per arm.")] = EVALUATION_SAMPLES,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Train a toy model with and without the anchor and compare both with the base model; no GPU or network needed."""
    from acpo_dist.cli.demo_run import run_demo
    from acpo_dist.core.errors import UsageError
    from acpo_dist.tracking.console import Console

    if model not in MODELS:
        raise UsageError(f"--model is `{model}`; a demo exists for {', '.join(MODELS)}.")
    started = time.monotonic()
    console = Console(live=not as_json)
    root = _new_folder(folder)
    report = run_demo(
        root, source=MODELS[model], seed=seed, iterations=iterations, samples=samples, arms=ARMS, console=console
    )
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        answer({"arms": report.arms, "run_dir": str(root), "mlflow_uri": report.mlflow_uri, "seconds": seconds})
        return
    rows = [[name, *(_shown(metrics[column]) for column in COLUMNS)] for name, metrics in report.arms.items()]
    console.table(f"{model}, {samples} images per arm, same prompts and seeds", ["arm", *COLUMNS], rows)
    console.message(
        "The reward is optimised; judge and exact oracle are not used in training. Without an anchor the reward "
        "rises and the images are ruined; with the anchor the gain is real."
    )
    console.message(f"images: {report.image}")
    console.message(f"done in {seconds:.0f} s: {root}")
    if report.charts:
        console.message(f"charts of the runs: {report.charts}")


def _new_folder(folder: Path) -> Path:
    """Return `demo-1`, `demo-2`, ...: no demo overwrites another."""
    number = 1 + sum(1 for _ in folder.glob("demo-*"))
    while (root := folder / f"demo-{number}").exists():
        number += 1
    root.mkdir(parents=True)
    return root


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
