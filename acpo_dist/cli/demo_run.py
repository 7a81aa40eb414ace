"""Training and evaluation of the demo, without its output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from acpo_dist.cli.backend import ports_for
from acpo_dist.config.load import load_config
from acpo_dist.config.schema import Config
from acpo_dist.core.ports import Ports
from acpo_dist.evaluation.metrics.arm import ArmReport, evaluate_toy_arm
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.images import save_grid
from acpo_dist.tracking.mlflow_query import charts_link
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.run import drive

_SHOWN = 12
"""Images per arm in the grid: the same prompts and seeds in every row."""


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """Metrics of every arm, and paths of the results."""

    arms: dict[str, dict[str, float | None]]
    image: Path
    mlflow_uri: str | None
    charts: str | None
    """Command that opens the charts of the runs; see `charts_link`."""


def run_demo(
    root: Path, *, source: str, seed: int, iterations: int | None, samples: int, arms: Mapping[str, Sequence[str]],
    console: Console,
) -> DemoReport:  # fmt: skip
    """Train every arm on one local Ray cluster; evaluate the base model before the first and each arm after it."""
    from actors.launch import connected

    reports: dict[str, ArmReport] = {}
    configs = {name: _config(source, root, name, overrides, seed, iterations) for name, overrides in arms.items()}
    uri: str | None = None
    with connected(next(iter(configs.values()))):
        for name, config in configs.items():

            def evaluate(config: Config, ports: Ports, prompts: tuple[str, ...], label: str) -> None:
                groups = fixed_groups(config, prompts, samples, stream="evaluation")
                names = [entry.name for entry in (*config.rewards.train, *config.rewards.judges)]
                with console.phase(f"evaluate {label}", None):
                    report = evaluate_toy_arm(ports.rollout, ports.reward, ports.learner, groups, names)
                reports[label] = report
                ports.tracker.log_metrics(
                    config.run.iterations if label != "base" else 0,
                    {f"evaluation/{key}": value for key, value in _row(report, config).items() if value is not None},
                )

            console.message(
                f"arm {name}: {config.run.iterations} iterations, {config.learner.num_ranks} ZeRO-"
                f"{config.learner.zero_stage} ranks, {config.rollout.num_workers} rollout worker(s)"
            )
            first = "base" not in reports
            result = drive(
                config, ports_for("ray"), console,
                at_start=(lambda c, p, t: evaluate(c, p, t, "base")) if first else None,
                at_end=lambda c, p, t, label=name: evaluate(c, p, t, label),
            )  # fmt: skip
            uri = result.mlflow_uri
    some = next(iter(configs.values()))
    image = root / "arms.png"
    order = ["base", *arms]
    images = torch.cat([reports[name].images[:_SHOWN] for name in order])
    save_grid(images, image, columns=min(_SHOWN, samples), labels=order, scale=2, title="same prompts, same seeds")
    charts = charts_link(uri, some.tracking.experiment) if uri else None
    return DemoReport(
        arms={name: _row(reports[name], some) for name in order}, image=image, mlflow_uri=uri, charts=charts
    )


def _config(source: str, root: Path, name: str, overrides: Sequence[str], seed: int, iterations: int | None) -> Config:
    extra = [f"run.iterations={iterations}"] if iterations is not None else []
    return load_config(source, [f"run.name={name}", f"run.dir={root / name}", f"run.seed={seed}", *extra, *overrides])


def _row(report: ArmReport, config: Config) -> dict[str, float | None]:
    return {
        "reward": report.scores[config.rewards.train[0].name],
        "judge": report.scores[config.rewards.judges[0].name],
        **report.oracle,
        "drift": report.drift,
    }
