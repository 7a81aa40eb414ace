"""Queries of MLflow runs and upload of files; they fail immediately if MLflow cannot be reached."""

import logging
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from acpo_dist.core.errors import UsageError
from acpo_dist.tracking.mlflow_records import METRICS_PER_BATCH, batches, legal_name
from acpo_dist.tracking.mlflow_run import shown_uri, sqlite_file

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
"""Seconds until a connection to a tracking server fails; MLflow's own client would retry for minutes."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """One run of an experiment."""

    run_id: str
    name: str
    status: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """Last value of each metric."""
    rows: Sequence[Mapping[str, Any]]
    """One mapping per step with the requested metrics, and `iteration`."""
    seconds: float | None


def find_tracked_runs(uri: str, experiment: str, histories: Sequence[str]) -> list[TrackedRun]:
    """Return the runs of an experiment, oldest first.

    Args:
        uri: tracking URI.
        experiment: name of the experiment.
        histories: prefixes of the metrics whose complete history is fetched, one request each.

    Raises:
        UsageError: MLflow is not installed, cannot be reached, or has no such experiment.
    """
    client = connect(uri)
    try:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            known = ", ".join(sorted(each.name for each in client.search_experiments())) or "none"
            raise UsageError(
                f"no experiment `{experiment}` at {shown_uri(uri)}; found: {known}. See tracking.experiment."
            )
        runs: list[Any] = []
        token = None
        while True:
            page = client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"], page_token=token)
            runs.extend(page)
            token = page.token
            if not token:
                return [_tracked(client, run, histories) for run in runs]
    except UsageError:
        raise
    except Exception as error:  # MLflow raises the exceptions of its stores, drivers and HTTP libraries
        raise _unusable(uri, error) from error


def charts_link(uri: str, experiment: str) -> str | None:
    """Return how to open the charts of an experiment's runs in MLflow's web page.

    Args:
        uri: tracking URI.
        experiment: name of the experiment.

    Returns:
        An address, after the command that serves it where the URI is not a server's; None if MLflow cannot be used or
        does not know the experiment.
    """
    try:
        found = connect(uri).get_experiment_by_name(experiment)
    except Exception as error:  # MLflow raises the exceptions of its stores, drivers and HTTP libraries
        logger.debug("no link to the charts of %s: %s", experiment, shown_uri(str(error)))
        return None
    if found is None:
        return None
    # The address of an experiment alone opens an overview of language model traces without runs.
    page = f"#/experiments/{found.experiment_id}/runs?compareRunsMode=CHART"
    if urlsplit(uri).scheme in ("http", "https"):
        return f"{shown_uri(uri).rstrip('/')}/{page}"
    command = "mlflow" if shutil.which("mlflow") else shlex.quote(str(Path(sys.executable).with_name("mlflow")))
    return f"{command} ui --backend-store-uri {shlex.quote(shown_uri(uri))}, then open http://127.0.0.1:5000/{page}"


def attach(
    uri: str, run_id: str, file: Path, *, folder: str, metrics: Mapping[str, float], step: int, tags: Mapping[str, str]
) -> None:
    """Add a file, metrics and tags to a run that may have ended; a second call replaces the file.

    Raises:
        UsageError: MLflow is not installed, cannot be reached, or does not know the run.
    """
    client = connect(uri)
    import time

    from mlflow.entities import Metric, RunTag

    now = time.time_ns() // 1_000_000
    try:
        client.log_artifact(run_id, str(file), folder)
        records = [Metric(legal_name(name), float(value), now, step) for name, value in metrics.items()]
        for batch in batches(records, METRICS_PER_BATCH):
            client.log_batch(run_id, metrics=batch)
        client.log_batch(run_id, tags=[RunTag(legal_name(name), value) for name, value in tags.items()])
    except Exception as error:  # as above
        raise _unusable(uri, error) from error


def connect(uri: str) -> "MlflowClient":
    """Return a client of an existing store.

    Raises:
        UsageError: MLflow is not installed, or the store cannot be reached.
    """
    try:
        import mlflow.tracking
    except ImportError as error:
        raise UsageError(
            f"this needs MLflow, which cannot be imported ({error}): pip install 'acpo-dist[mlflow]'"
        ) from error
    _require_there(uri)
    try:
        return mlflow.tracking.MlflowClient(tracking_uri=uri)
    except Exception as error:  # as above
        raise _unusable(uri, error) from error


def _require_there(uri: str) -> None:
    """Reject a store that MLflow would create, or a server to which it would try to connect for minutes."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        try:
            socket.create_connection(address, CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise _unusable(uri, error) from error
        return
    file = sqlite_file(uri)
    if file is None and parts.scheme in ("", "file"):
        file = Path(parts.path)
    if file is not None and not file.exists():
        raise _unusable(uri, FileNotFoundError(f"{file} does not exist"))


def _tracked(client: "MlflowClient", run: Any, histories: Sequence[str]) -> TrackedRun:
    rows: dict[int, dict[str, Any]] = {}
    for name in run.data.metrics:
        if name.startswith(tuple(histories)):
            for point in client.get_metric_history(run.info.run_id, name):
                rows.setdefault(point.step, {"iteration": point.step})[name] = point.value
    start, end = run.info.start_time, run.info.end_time
    return TrackedRun(
        run_id=run.info.run_id, name=run.info.run_name, status=run.info.status, params=dict(run.data.params),
        tags=dict(run.data.tags), metrics=dict(run.data.metrics), rows=[rows[step] for step in sorted(rows)],
        seconds=(end - start) / 1000 if start and end else None,
    )  # fmt: skip


def _unusable(uri: str, error: Exception) -> UsageError:
    said = f"{type(error).__name__}: {error}".partition("\n")[0]
    return UsageError(
        f"MLflow at {shown_uri(uri)} cannot be used ({shown_uri(said)}). Start its server, correct --uri (or "
        "MLFLOW_TRACKING_URI, tracking.mlflow_uri), or give run folders instead."
    )
