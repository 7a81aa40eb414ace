"""`acpo doctor`: check this machine, a configuration on it, or a cluster."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acpo_dist.cli.app import answer, app

if TYPE_CHECKING:
    from acpo_dist.preflight.doctor.finding import Check, Finding

_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "failed": "red"}


@app.command("doctor")
def doctor(
    source: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="File, or name of a shipped one.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to check, such as auto or HOST:6379.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check libraries, devices and storage; the model and rewards of a CONFIG; the machines of a cluster."""
    from acpo_dist.preflight.doctor.finding import run_checks, worst
    from acpo_dist.tracking.console import Console

    findings: list[Finding] = []
    # In text form, the findings themselves show the progress.
    with Console(quiet=not as_json).phase("doctor", None) as advance:
        for check in _checks(source, overrides or [], address):
            for finding in run_checks([check]):
                findings.append(finding)
                if not as_json:
                    _show(finding)
            advance(1)
    verdict = worst(findings)
    if as_json:
        answer({"verdict": verdict, "findings": [finding.to_mapping() for finding in findings]})
    else:
        counts = [f"{sum(one.verdict == kind for one in findings)} {kind}" for kind in _COLOURS]
        typer.echo(f"\n{', '.join(counts)}")
    if verdict == "failed":
        raise typer.Exit(1)


def _checks(source: str | None, overrides: list[str], address: str | None) -> Iterator[tuple[str, "Check"]]:
    """Yield the checks in order; slow imports come last, and each check runs after the earlier findings are shown.

    Raises:
        ConfigError: the configuration is invalid; raised before any check.
    """
    from acpo_dist.core.errors import AcpoError
    from acpo_dist.preflight.doctor.finding import Finding

    config, broken = None, ""
    try:
        if source is not None:
            from acpo_dist.config.load import load_config

            config = load_config(source, overrides)
    except AcpoError:
        raise
    except Exception as error:
        # A broken library can prevent reading it; the checks of libraries report which.
        broken = f"{source} cannot be read with these libraries: {type(error).__name__}: {error}".splitlines()[0]
    yield from _of_the_machine()
    if broken:
        yield "configuration", lambda: [Finding("configuration", "failed", broken, "Repair the libraries above first.")]
        return
    if config is not None:
        yield from _of_a_configuration(config)
    yield from _of_storage(config)
    yield from _of_a_cluster(config, address)


def _of_the_machine() -> Iterator[tuple[str, "Check"]]:
    from acpo_dist.preflight.doctor import machine, packages

    yield "machine", machine.check_system
    yield "libraries", packages.check_packages
    yield "torchvision", packages.check_torchvision
    yield "devices", machine.check_devices
    yield "process group", machine.check_process_group


def _of_a_configuration(config: Any) -> Iterator[tuple[str, "Check"]]:
    from acpo_dist.cli.backend import choose_backend
    from acpo_dist.preflight.doctor import configured
    from acpo_dist.preflight.doctor.finding import Finding

    yield "backend", lambda: [Finding("backend", "ok", choose_backend(config))]
    yield "model", lambda: configured.check_model(config)
    yield "base samples", lambda: configured.check_base_samples(config)
    yield from configured.data_checks(config)
    yield "rewards", lambda: configured.check_rewards(config)
    yield "plan", lambda: configured.check_plan(config)
    yield "run folder", lambda: configured.check_folder(config)


def _of_storage(config: Any) -> Iterator[tuple[str, "Check"]]:
    from acpo_dist.preflight.doctor import storage
    from acpo_dist.tracking.mlflow_tracker import default_uri

    run_dir = config.run_dir if config is not None else _runs() / "run"
    if config is None:
        yield "runs", lambda: storage.check_runs(_runs())
    if config is None or config.tracking.mlflow:
        uri = (config and config.tracking.mlflow_uri) or default_uri(run_dir)
        yield "tracking", lambda: storage.check_tracking(uri)
    yield "model cache", storage.check_hub


def _of_a_cluster(config: Any, address: str | None) -> Iterator[tuple[str, "Check"]]:
    from acpo_dist.config.relations import module_available

    if not module_available("ray"):
        return
    where = address or (config and config.cluster.address) or os.environ.get("RAY_ADDRESS")

    def machines() -> Iterator["Finding"]:
        from actors.cluster.checks import check_cluster

        # Without an address a run starts its own cluster, so that is checked.
        return check_cluster(where or "local", config.run_dir.parent if config else _runs())

    def placement() -> Iterator["Finding"]:
        from acpo_dist.preflight.doctor.finding import judged
        from actors.cluster.capacity import cluster_capacity

        found = cluster_capacity(config, where or "auto")
        lacking = [*(f"{amount:g} {name}" for name, amount in found["missing"].items()), *found["missing_by_role"]]
        yield judged(
            not lacking, "placement", f"missing: {'; '.join(lacking)}" if lacking else "every role can be placed",
            "Add machines, or configure fewer workers; `acpo plan --address` shows the resources.", otherwise="failed",
        )  # fmt: skip

    yield "cluster", machines
    if config is not None and where is not None:
        yield "placement", placement


def _runs() -> Path:
    return Path(os.environ.get("ACPO_RUNS", "runs"))


def _show(finding: "Finding") -> None:
    verdict = typer.style(f"{finding.verdict:>8}", fg=_COLOURS[finding.verdict])
    typer.echo(f"{verdict}  {finding.check}: {finding.found}")
    if finding.advice:
        typer.echo(f"          {finding.advice}")
    sys.stdout.flush()
