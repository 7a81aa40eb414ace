"""`acpo rewards distil`: a metric as a small network on latents."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer
from acpo_dist.cli.rewards import rewards_app


@rewards_app.command("distil")
def distil_command(
    metric: Annotated[str, typer.Argument(metavar="METRIC", help="Metric as in `acpo score --reward`.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    model: Annotated[
        str, typer.Option(help="Run, configuration, pipeline folder, checkpoint file or toy that draws the rollouts.")
    ] = "toy_sdxl",
    out: Annotated[Path, typer.Option(help="safetensors file for the critic; a report in JSON is written beside.")] = (
        Path("critic.safetensors")
    ),
    rollouts: Annotated[int, typer.Option(min=8, help="Samples drawn and labelled.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 2000,
    width: Annotated[int, typer.Option(min=4, help="Channels of the first layers.")] = 32,
    batch_size: Annotated[int, typer.Option(min=2, help="States per step.")] = 64,
    learning_rate: Annotated[float, typer.Option(min=1e-8, help="Highest learning rate.")] = 2e-3,
    gradient_weight: Annotated[
        float, typer.Option(min=0, help="Weight of the gradient's error beside the score's; 0 fits scores only.")
    ] = 1.0,
    held_out: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of the rollouts for the report.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of split, weights and batches; run.seed sets the rollouts'.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with the report.")] = False,
) -> None:
    """Fit a small network on latents to a metric's score and gradient of the decoded image, on a model's rollouts.

    Prints its error by timestep on held-out rollouts. Use it as a reward that needs no decoder, with the metric itself
    as a judge: rewards.train=[{type: latent_critic, weights: FILE}].
    """
    from acpo_dist.core.errors import UsageError
    from acpo_dist.rewards.naming import metric_section
    from acpo_dist.rewards.training.critic import CriticSettings
    from acpo_dist.tracking.console import Console
    from acpo_dist.training.distil import distil, require_distillable
    from acpo_dist.training.open_model import open_rollouts, source_config

    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: expected a file ending in .safetensors.")
    section = metric_section(metric, "METRIC")
    config, run = source_config(model, overrides or [])
    require_distillable(section, config)
    console = Console()
    with console.phase("load the model", None):
        pool = open_rollouts(config, run)
    settings = CriticSettings(
        width=width, steps=steps, batch_size=batch_size, learning_rate=learning_rate, gradient_weight=gradient_weight,
        seed=seed,
    )  # fmt: skip
    report = distil(section, config, pool, out, settings, count=rollouts, held_out=held_out, console=console)
    if as_json:
        answer(asdict(report))
        return
    console.table(
        f"{report.metric} of {report.model}: {report.held_out_rollouts} of {report.rollouts} rollouts held out; "
        "std: error of a constant; cosine: of the gradients",
        ["timestep", "states", "mean", "std", "bias", "rms error", "srcc", "cosine"],
        [
            ["finished" if row.timestep < 0 else f"{row.timestep:g}", row.states, *map(_number, (
                row.mean, row.std, row.bias, row.rms_error, row.srcc, row.cosine
            ))]
            for row in report.by_timestep
        ],
    )  # fmt: skip
    console.message(
        f"{report.parameters} parameters; CPU ms per score and gradient: {1000 * report.critic_cpu_s:.2f}, of decoder "
        f"and metric {1000 * report.metric_cpu_s:.2f}\n"
        f"use it: rewards.train=[{{type: latent_critic, weights: {report.weights}}}], with the metric in rewards.judges"
    )


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"
