"""`acpo sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from acpo_dist.cli.app import answer, app

if TYPE_CHECKING:
    from acpo_dist.config.schema import Config


@app.command("sweep")
def sweep(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or name of a shipped configuration.")],
    axes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=A,B,C]...", help="Values of a key, separated by commas; one value is a constant."),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="Named set of overrides, as 'reward_only=algorithm.anchor.weight=0'; repeat."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Values of run.seed: 0 1 2, or 0,1,2.")] = "0",
    out: Annotated[Path, typer.Option(help="Folder of the sweep: one folder per combination and seed.")] = Path(
        "runs/sweep"
    ),
    backend: Annotated[
        str | None, typer.Option(help="local, ray or auto; default: cluster.backend of the configuration.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the runs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Train every combination of values with every seed; table and chart of quality against drift.

    Runs are executed one after another, on the backend of the configuration. The same command continues a sweep:
    finished runs are kept, the others continue from their newest checkpoint. Exit code 1 if a run failed.
    """
    from acpo_dist.analysis.sweep.combinations import combinations, configurations
    from acpo_dist.analysis.sweep.sweep import run_sweep
    from acpo_dist.cli.backend import choose_backend, ports_for
    from acpo_dist.tracking.console import Console, print_table
    from acpo_dist.training.run import drive

    numbers, values = _seeds(seeds, axes or [])
    extra = [f"cluster.backend={backend}"] if backend else []
    grid = combinations(values, arm or [])
    configs = configurations(source, grid, numbers, out, extra)
    console = Console(live=not as_json)

    def train(config: "Config") -> None:
        drive(config, ports_for(choose_backend(config)), console, resume="auto")

    if dry_run:
        if as_json:
            answer({"runs": [str(config.run_dir) for config in configs]})
            return
        rows = [[each.name, " ".join(each.overrides)] for each in grid]
        print_table(
            f"{len(configs)} runs: {len(grid)} combinations, seeds {numbers}", ["combination", "overrides"], rows
        )
        return
    result = run_sweep(configs, out, train, console.message)
    if as_json:
        answer(result.to_mapping())
    else:
        print_table("mean ± standard deviation over seeds; *: on the front of quality and drift", *result.table)
        for folder, text in result.failed.items():
            console.message(f"{folder} failed: {text}")
        if result.chart:
            console.message(f"chart: {result.chart}; page: {result.page}")
    raise typer.Exit(1 if result.failed else 0)


def _seeds(text: str, arguments: list[str]) -> tuple[list[int], list[str]]:
    """Return seeds and axes: `--seeds 0 1 2` leaves 1 and 2 among the arguments."""
    from acpo_dist.core.errors import UsageError

    numbers = [*text.replace(",", " ").split(), *(each for each in arguments if each.isdigit())]
    if not all(each.isdigit() for each in numbers):
        raise UsageError(f"--seeds {text}: expected whole numbers, as in --seeds 0 1 2")
    return [int(each) for each in numbers], [each for each in arguments if not each.isdigit()]
