"""`acpo train`."""

from typing import TYPE_CHECKING, Annotated

import typer

from acpo_dist.cli.app import answer, app

if TYPE_CHECKING:
    from acpo_dist.config.schema import Config


@app.command("train")
def train(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or name of a shipped configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as learner.learning_rate=1e-4.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="local, ray or auto; default: cluster.backend of the configuration.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Continue: auto (run.dir), a run folder, or a checkpoint folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Train a model on rewards of its own samples, with an anchor to the base model."""
    from acpo_dist.cli.backend import choose_backend, launched_processes
    from acpo_dist.config.load import load_config

    processes = launched_processes()
    extra = [f"cluster.backend={backend}"] if backend else []
    if processes > 1:
        # One rank for each process that `accelerate launch` or torchrun started.
        extra = ["cluster.backend=local", f"learner.num_ranks={processes}"]
    config = load_config(source, [*(overrides or []), *extra])
    chosen = choose_backend(config)
    if processes == 1:
        _train(config, chosen, resume, as_json)
        return
    from acpo_dist.training.launched import launched_group

    with launched_group() as leads:
        if leads:
            _train(config, chosen, resume, as_json)


def _train(config: "Config", backend: str, resume: str | None, as_json: bool) -> None:
    from acpo_dist.cli.backend import ports_for
    from acpo_dist.tracking.console import Console
    from acpo_dist.training.run import drive

    console = Console(live=not as_json)
    console.message(
        f"{config.run.name}: {config.run.iterations} iterations, backend {backend}, folder {config.run_dir}"
    )
    if backend == "local" and (config.rollout.num_workers > 1 or config.rewards.replicas > 1):
        console.message(
            f"in one process rollout.num_workers={config.rollout.num_workers} and "
            f"rewards.replicas={config.rewards.replicas} have no effect; images and metrics are the same"
        )
    result = drive(config, ports_for(backend), console, resume=resume)
    if as_json:
        answer(
            {
                "run_dir": str(result.run_dir), "iterations": result.iterations, "metrics": result.metrics,
                "mlflow_uri": result.mlflow_uri, "mlflow_run_id": result.mlflow_run_id, "export": str(result.export),
                "seconds": round(result.seconds, 1), "stopped_by_guard": result.guard.text if result.guard else None,
            }
        )  # fmt: skip
        raise typer.Exit(3 if result.guard else 0)
    console.message(f"done in {result.seconds:.0f} s: {result.run_dir}; tuned weights in {result.export}")
    if result.mlflow_uri:
        from acpo_dist.tracking.mlflow_query import charts_link

        link = charts_link(result.mlflow_uri, config.tracking.experiment)
        if link:
            console.message(f"charts of the runs: {link}")
    if result.guard:
        kept = (
            f"the export holds iteration {result.guard.best_iteration}, the best by the judges"
            if result.guard.action == "roll_back"
            else "the export holds the last weights; guard.action=roll_back would export the best"
        )
        console.message(f"stopped by the guard:\n{result.guard.text}\n{kept}")
        raise typer.Exit(3)
