"""`acpo demo`: base, reward-only and ACPO side by side on the embedded toy SDXL, on a local Ray cluster."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer, app

# What one does who looks at the reward alone: nothing holds the model, and the rate is the one that gives most reward.
_REWARD_ONLY = [
    "algorithm.anchor.weight=0", "algorithm.anchor.budget=null", "learner.learning_rate=8.0e-3",
    "learner.lr_decay_ratio=0",
]  # fmt: skip
ARMS = {"reward_only": _REWARD_ONLY, "acpo": []}
EVALUATION_SAMPLES = 480
COLUMNS = ("reward", "judge", "oracle_mse", "oracle_psnr", "caption_accuracy", "template_entropy", "drift")


@app.command("demo")
def demo(
    folder: Annotated[
        Path, typer.Option(help="Where runs, MLflow and the image go; a new folder below it per demo.")
    ] = Path("runs"),
    seed: Annotated[int, typer.Option(help="Seed of training; evaluation prompts and seeds follow from it.")] = 0,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Iterations per arm; None takes configs/demo.yaml's.")
    ] = None,
    samples: Annotated[int, typer.Option(min=8, help="Evaluation samples per arm.")] = EVALUATION_SAMPLES,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Train a toy on the reward alone and with ACPO, and compare both with the base; no GPU or network needed."""
    from acpo_dist.cli.demo_run import run_demo
    from acpo_dist.tracking.console import Console

    started = time.monotonic()
    console = Console(live=not as_json)
    root = _new_folder(folder)
    report = run_demo(root, seed=seed, iterations=iterations, samples=samples, arms=ARMS, console=console)
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        answer({"arms": report.arms, "run_dir": str(root), "mlflow_uri": report.mlflow_uri, "seconds": seconds})
        return
    rows = [[name, *(_figure(metrics[column]) for column in COLUMNS)] for name, metrics in report.arms.items()]
    console.table(f"Toy SDXL, {samples} images per arm, same prompts and seeds", ["arm", *COLUMNS], rows)
    console.message(
        "reward is what was optimised; judge and the exact oracle never drive the update. Reward alone raises the "
        "reward and ruins the images; the anchor keeps the gain real."
    )
    console.message(f"images: {report.image}")
    console.message(f"done in {seconds:.0f} s: {root}")
    if report.charts:
        console.message(f"charts of the runs: {report.charts}")


def _new_folder(folder: Path) -> Path:
    """`demo-1`, `demo-2`, ...: nothing is overwritten."""
    number = 1 + sum(1 for _ in folder.glob("demo-*"))
    while (root := folder / f"demo-{number}").exists():
        number += 1
    root.mkdir(parents=True)
    return root


def _figure(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
