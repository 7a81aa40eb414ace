"""`acpo submit`: submit a run as a job of a Ray cluster."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer, app, interruption, say


@app.command("submit")
def submit(
    source: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="File, or name of a shipped one.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Job service; by default RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265.")
    ] = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="Folder to upload; by default the current one, or none for a shipped CONFIG.")
    ] = None,
    ship_code: Annotated[
        bool, typer.Option("--ship-code", help="Run this checkout instead of the installed version.")
    ] = False,
    env: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Environment of the job.")] = None,
    cpus: Annotated[
        float, typer.Option(min=0, help="CPUs reserved for the driver; 0 keeps it on the head node.")
    ] = 0.0,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs reserved for the driver.")] = 0.0,
    resume: Annotated[str | None, typer.Option(help="Resume as in `acpo train`.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job; default: chosen by Ray.")] = None,
    follow: Annotated[bool, typer.Option(help="Show the job's output until it ends.")] = True,
    list_: Annotated[bool, typer.Option("--list", help="List jobs.")] = False,
    stop: Annotated[str | None, typer.Option(metavar="JOB", help="Stop a job; its checkpoints are kept.")] = None,
    logs: Annotated[str | None, typer.Option(metavar="JOB", help="Output of a job until it ends.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Train on a cluster: validate the configuration here, upload its files, and start `acpo train` there."""
    from acpo_dist.config.relations import module_available
    from acpo_dist.core.errors import UsageError

    if sum((source is not None, list_, stop is not None, logs is not None)) != 1:
        raise UsageError("give one of CONFIG, --list, --stop JOB or --logs JOB")
    if not module_available("ray"):
        raise UsageError("jobs need Ray, which is not installed: pip install 'acpo-dist[ray]'")
    # Checked before the upload.
    start = _checked(source, overrides or [], resume, working_dir, ship_code, env or []) if source else None
    from actors.cluster import jobs

    client = jobs.connect(address)
    if list_:
        _show(jobs.list_jobs(client), as_json)
    elif stop is not None:
        jobs.require_job(client, stop)
        client.stop_job(stop)
        _end({"job": stop, "status": "STOPPING"}, f"{stop} is stopping; see --list", as_json)
    elif logs is not None:
        jobs.require_job(client, logs)
        if follow:
            _follow(client, logs, as_json)
        else:
            (sys.stderr if as_json else sys.stdout).write(client.get_job_logs(logs))
            _end(jobs.require_job(client, logs), "", as_json)
    elif start is not None:
        arguments, upload, variables = start
        job = jobs.submit(client, arguments, upload=upload, env=variables, job=name, cpus=cpus, gpus=gpus)
        what = ", ".join(upload.only) or upload.folder if upload else None
        say(f"{job} started" + (f", {what} uploaded" if what else ""))
        if follow:
            _follow(client, job, as_json)
        else:
            _end(jobs.require_job(client, job), f"acpo submit --logs {job}", as_json)


def _checked(
    source: str, overrides: list[str], resume: str | None, folder: Path | None, ship_code: bool, env: list[str]
) -> tuple[list[str], Any, dict[str, str]]:
    from acpo_dist.config.load import load_config
    from acpo_dist.core.errors import UsageError
    from actors.cluster.job_files import relative_files
    from actors.cluster.jobs import plan_upload, with_files

    odd = [pair for pair in env if not pair.partition("=")[0] or "=" not in pair]
    if odd:
        raise UsageError(f"expected --env KEY=VALUE, found `{odd[0]}`")
    config = load_config(source, overrides)
    called, upload = plan_upload(source, folder, ship_code=ship_code)
    upload = with_files(upload, relative_files(config))
    arguments = [called, *overrides, "--backend", "ray", *(["--resume", resume] if resume else [])]
    return arguments, upload, {pair.partition("=")[0]: pair.partition("=")[2] for pair in env}


def _follow(client: Any, job: str, as_json: bool) -> None:
    from actors.cluster import jobs

    def write(text: str) -> None:
        stream = sys.stderr if as_json else sys.stdout
        stream.write(text)
        stream.flush()

    try:
        status = jobs.follow(client, job, write)
    except KeyboardInterrupt:
        say(f"{job} is still running; `acpo submit --logs {job}` shows its output, `acpo submit --stop {job}` ends it")
        raise typer.Exit(interruption()[1]) from None
    _end(jobs.require_job(client, job), f"{job}: {status}", as_json)
    if status != "SUCCEEDED":
        raise typer.Exit(1)


def _show(found: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        answer({"jobs": found})
        return
    import datetime

    import rich.console

    from acpo_dist.tracking.console import Console

    console = Console(rich_console=rich.console.Console(file=sys.stdout))
    if not found:
        console.message("this cluster has no submitted jobs")
        return
    rows = []
    for one in found:
        begun = one["started"] and datetime.datetime.fromtimestamp(one["started"]).strftime("%Y-%m-%d %H:%M:%S")
        rows.append([one["job"], one["status"], begun or "-", one["entrypoint"]])
    console.table("jobs", ["job", "status", "started", "command"], rows)


def _end(facts: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        answer(facts)
    elif text:
        say(text)
