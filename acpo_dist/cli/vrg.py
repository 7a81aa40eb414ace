"""`acpo vrg`: measure the prediction error, optimise a trajectory with it, and show both."""

from pathlib import Path
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer, app, say

vrg_app = typer.Typer(no_args_is_help=True, help="Variance-Reduction Guidance: trajectories from measured errors.")
app.add_typer(vrg_app, name="vrg")


@vrg_app.command("measure")
def measure_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Run, configuration, pipeline folder or toy-sdxl.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    out: Annotated[Path, typer.Option(help="Artefact to write; a plot is written beside it.")] = Path("vrg.json"),
    gate: Annotated[bool, typer.Option(help="Validate the optimum against a long reference, as training does.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Measure the error table of a model on its own samples, then optimise and validate a trajectory."""
    from acpo_dist.data.prompts import run_prompts
    from acpo_dist.tracking.console import Console
    from acpo_dist.training.open_model import keeps_own_trajectory, open_rollouts, source_config
    from acpo_dist.training.trajectory.artefact import artefact_of, write_artefact
    from acpo_dist.training.trajectory.measure import measure
    from acpo_dist.training.trajectory.validate import consider, describe

    config, run = source_config(source, overrides or [])
    prompts = run_prompts(config)
    console = Console()
    pool = open_rollouts(config, run, own_sampler=keeps_own_trajectory(overrides or []))
    alpha_bars = pool.alpha_bars().numpy()
    with console.phase("measure", None):
        sums = measure(pool, config, prompts, alpha_bars, images=config.vrg.images, label="measure")
    before = pool.trajectory()
    with console.phase("optimise and validate", None):
        update = consider(
            pool, config, prompts, sums, before, alpha_bars, prove=gate,
            provenance={"source": source, "seed": config.run.seed, "alpha_bars": alpha_bars.tolist()},
        )  # fmt: skip
    artefact = artefact_of(update, before, alpha_bars)
    write_artefact(out, artefact, update.table, {"before": before, "now": update.trajectory})
    console.message(f"{describe(update)}; {out}, {out.with_suffix('.png')}")
    if as_json:
        answer({"artefact": str(out), **artefact})


@vrg_app.command("optimize")
def optimize_command(
    table: Annotated[Path, typer.Option(help="Error table: published text format, or an artefact of ours.")],
    trajectory: Annotated[Path, typer.Option(help="Trajectory to start from: text format or artefact.")],
    mode: Annotated[
        str, typer.Option(help="log_trust (noisy end fixed), paper_box (parity) or hso_grid (schedule alone).")
    ] = "log_trust",
    trust: Annotated[
        float, typer.Option(help="log_trust: share of the gap in log sigma that a level may move.")
    ] = 0.25,
    lp: Annotated[float, typer.Option(help="paper_box: half width of the box around alpha_i.")] = 0.01,
    reg_lambda: Annotated[float, typer.Option(help="paper_box: weight of the end point's shift.")] = 100.0,
    solver: Annotated[str, typer.Option(help="Solver whose response defines J.")] = "first_order",
    out: Annotated[Path | None, typer.Option(help="Artefact to write; a plot is written beside it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Optimise a trajectory on an existing table; takes a fraction of a second."""
    from acpo_dist.training.trajectory.artefact import optimise_files, write_artefact

    report, plot = optimise_files(
        table, trajectory, mode=mode, trust=trust, lp=lp, reg_lambda=reg_lambda, solver=solver
    )
    if out is not None:
        write_artefact(out, report, *plot)
    if as_json:
        answer(report)
        return
    _print(report)


@vrg_app.command("show")
def show_command(
    path: Annotated[Path, typer.Argument(help="Artefact, or a run, whose newest artefact is shown.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the artefact.")] = False,
) -> None:
    """Show an artefact: the table, the trajectory before and after, and the validation."""
    from acpo_dist.training.trajectory.artefact import newest_artefact, read_artefact

    report = read_artefact(newest_artefact(path))
    if as_json:
        answer(report)
        return
    _print(report)


def _print(report: dict[str, Any]) -> None:
    from acpo_dist.tracking.console import Console
    from acpo_dist.training.trajectory.validate import candidate_of

    console = Console()
    now = report["trajectory"]
    if "before" not in report:
        # `acpo export` writes the trajectory alone.
        steps = zip(now["timesteps"], now["alpha_bars"], strict=False)
        cells = [[str(step), f"{t:.1f}", f"{level:.6g}"] for step, (t, level) in enumerate(steps)]
        console.table("trajectory", ["step", "timestep", "alpha_bar"], cells)
        return
    before = report["before"]
    rows = [
        [str(step), f"{old_t:.1f}", f"{old:.6g}", f"{new_t:.1f}", f"{new:.6g}"]
        for step, (old_t, old, new_t, new) in enumerate(
            zip(before["timesteps"], before["alpha_bars"], now["timesteps"], now["alpha_bars"], strict=False)
        )
    ]
    title = f"cumulative error {report['j0']:.6g} -> {report['j1']:.6g}"
    console.table(title, ["step", "timestep before", "alpha_bar before", "timestep", "alpha_bar"], rows)
    for gate in report.get("gates", []):
        ratio, steps = f"ratio {gate['ratio']:.3f}", f"{gate['reference_steps']} steps"
        # Artefacts of earlier versions do not name the search.
        search = gate.get("search", "hso_grid" if gate["trust"] is None else "vrg")
        say(f"validation{candidate_of(search, gate['trust'])}: distance to {steps}, {ratio}{_clipped(gate)}")
    if "adopted" in report:
        say("adopted" if report["adopted"] else "kept the previous trajectory")


def _clipped(gate: dict[str, Any]) -> str:
    share = gate.get("clipped_elements", 0.0)
    return f"; clipped at {gate['clipped_steps']:.0%} of the steps, {share:.1%} of the elements" if share else ""
