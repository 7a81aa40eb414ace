"""Find or create the MLflow run of an experiment run."""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from acpo_dist.core.errors import ConfigError, hide_passwords
from acpo_dist.tracking.mlflow_records import ENTITIES_PER_BATCH, batches, is_refusal

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Name, experiment, params and tags of a run."""

    uri: str
    experiment: str
    run_name: str
    params: Mapping[str, str]
    """Configuration as flat key-value pairs."""
    tags: Mapping[str, str]


def open_run(client: "MlflowClient", facts: RunFacts, known_id: str) -> "Run":
    """Continue the run `known_id`, with status RUNNING, or start a new one if the id is empty or unknown.

    Raises:
        ConfigError: the experiment was deleted in MLflow.
        Exception: raised by MLflow if it cannot be reached.
    """
    run = _find_run(client, known_id) if known_id else None
    if run is not None:
        client.update_run(run.info.run_id, status="RUNNING")
        return run
    if known_id:
        logger.warning("MLflow run %s no longer exists in %s; starting a new one", known_id, shown_uri(facts.uri))
    return client.create_run(_experiment_id(client, facts), run_name=facts.run_name)


def describe_run(client: "MlflowClient", run: "Run", facts: RunFacts) -> None:
    """Set the tags of a run and its missing params; MLflow params are immutable.

    Raises:
        Exception: raised by MLflow if it cannot be reached.
    """
    from mlflow.entities import Param, RunTag

    new = [Param(key, value) for key, value in facts.params.items() if key not in run.data.params]
    tags = [RunTag(key, value) for key, value in facts.tags.items()]
    try:
        for batch in batches(new, ENTITIES_PER_BATCH):
            client.log_batch(run.info.run_id, params=batch)
        for batch in batches(tags, ENTITIES_PER_BATCH):
            client.log_batch(run.info.run_id, tags=batch)
    except Exception as error:  # MLflow raises the exceptions of its store
        if not is_refusal(error):
            raise
        # `resolved.yaml` holds the same data; metrics must not wait for params that the server rejects.
        logger.warning("MLflow rejected params or tags of run %s, which are now incomplete: %s", run.info.run_id, error)


def shown_uri(text: str) -> str:
    """Return text for logs, with the password of a tracking URI removed."""
    return hide_passwords(text)


def access_advice(said: str) -> str:
    """What to do about an MLflow server that responds but refuses access; empty for any other error.

    Args:
        said: text of the error, with status code and body.
    """
    if "Invalid Host header" in said:
        return (
            "The server does not accept the host name in this address: start it with `mlflow server --allowed-hosts "
            "HOST:PORT` (or MLFLOW_SERVER_ALLOWED_HOSTS), or use an address that it accepts."
        )
    if re.search(r"\b(401|403)\b", said):
        return "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
    return ""


def sqlite_file(uri: str) -> Path | None:
    """Return the database file of a SQLite URI; None for another store or one in memory."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url  # MLflow's own conversion: its handling of % and ? changed between versions.

    database = make_url(uri).database
    return Path(os.path.abspath(database)) if database and database != ":memory:" else None


def sqlite_uri(file: Path) -> str:
    """Return the SQLite URI of an absolute path."""
    # Quote only `%` and `?`: MLflow creates a stray folder for a path with unnecessary quoting.
    return "sqlite:///" + str(file).replace("%", "%25").replace("?", "%3F")


def make_sqlite(uri: str, new_client: Callable[..., object]) -> None:
    """Create the database of a SQLite URI atomically if it does not exist.

    MLflow creates it in place, in some seventy steps without a lock: two concurrent processes, or one killed process,
    leave an unusable database (mlflow 3.17, `SqlAlchemyStore.__init__`).

    Raises:
        OSError: the folder cannot be written.
        Exception: whatever MLflow raises.
    """
    file = sqlite_file(uri)
    if file is None or file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    # This logger reports every created table.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=file.parent) as folder:
        part = Path(folder) / file.name
        new_client(tracking_uri=sqlite_uri(part))
        try:
            os.link(part, file)
        except FileExistsError:
            logger.debug("another process made %s first", file)
        except OSError:  # a file system without hard links
            os.replace(part, file)


def _find_run(client: "MlflowClient", run_id: str) -> "Run | None":
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _experiment_id(client: "MlflowClient", facts: RunFacts) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(facts.experiment)
    if found is None:
        database = sqlite_file(facts.uri)
        artifacts = (database.parent / "mlartifacts").as_uri() if database else None
        try:
            return client.create_experiment(facts.experiment, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(facts.experiment)  # another process was faster
    if found is None or found.lifecycle_stage != "active":
        raise ConfigError(
            f"the MLflow experiment `{facts.experiment}` was deleted in {shown_uri(facts.uri)}; restore it with "
            "`mlflow experiments restore`, or set another one in `tracking.experiment`."
        )
    return found.experiment_id
