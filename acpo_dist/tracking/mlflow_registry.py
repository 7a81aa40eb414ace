"""Registration of a folder as a new model version in the MLflow model registry."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from acpo_dist.core.errors import AcpoError, ConfigError
from acpo_dist.tracking.mlflow_records import is_refusal, tag_values
from acpo_dist.tracking.mlflow_run import RunFacts, make_sqlite, open_run, shown_uri
from acpo_dist.tracking.mlflow_tracker import default_uri

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)


class TrackingError(AcpoError):
    """A request to MLflow that requires an immediate result failed."""


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """A version in the registry."""

    uri: str
    """Tracking URI, without a password."""
    name: str
    version: str
    run_id: str
    source: str
    """Address of its files."""

    @property
    def model_uri(self) -> str:
        """URI in the form of MLflow's own functions."""
        return f"models:/{self.name}/{self.version}"


def register(
    *, uri: str | None, run_dir: Path, experiment: str, run_name: str, model: str, folder: Path, description: str,
    tags: Mapping[str, str], alias: str | None,
) -> ModelVersion:  # fmt: skip
    """Upload a folder to the MLflow run of a run, and register it as the next version of a model.

    Args:
        uri: tracking URI; None uses MLFLOW_TRACKING_URI, or the database beside the run.
        run_dir: the run; its `mlflow/run_id` names its MLflow run. An untracked run gets a new MLflow run.
        model: name of the registered model, created if it does not exist.
        alias: moved to the new version; None changes no alias.

    Raises:
        ConfigError: MLflow is not installed.
        TrackingError: MLflow cannot be reached or rejects the request.
    """
    try:
        import mlflow.tracking
    except ImportError as error:
        raise ConfigError(
            f"a model registry needs MLflow, which cannot be imported ({error}): pip install 'acpo-dist[mlflow]'."
        ) from error
    where = uri or default_uri(run_dir)
    try:
        make_sqlite(where, mlflow.tracking.MlflowClient)
        client = mlflow.tracking.MlflowClient(tracking_uri=where)
        run_id = _run_id(client, where, run_dir, experiment, run_name)
        _model(client, model)
        client.log_artifacts(run_id, str(folder), f"promoted/{folder.name}")
        source = f"{client.get_run(run_id).info.artifact_uri}/promoted/{folder.name}"
        version = client.create_model_version(
            model, source, run_id=run_id, tags=tag_values(tags), description=description
        )
        if alias is not None:
            client.set_registered_model_alias(model, alias, version.version)
    except AcpoError:
        raise
    except Exception as error:  # MLflow raises the exceptions of its stores, drivers and HTTP libraries
        said = "refused" if is_refusal(error) else "cannot be used"
        why = shown_uri(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise TrackingError(
            f"MLflow at {shown_uri(where)} {said}: {why} Nothing was promoted; the export and its card are written. "
            "Set another store with --uri."
        ) from error
    return ModelVersion(
        uri=shown_uri(where), name=model, version=str(version.version), run_id=run_id, source=shown_uri(source)
    )


def _run_id(client: "MlflowClient", uri: str, run_dir: Path, experiment: str, run_name: str) -> str:
    """Return the MLflow run of a run; it is ended again, since opening it sets its status to RUNNING."""
    file = run_dir / "mlflow" / "run_id"
    known = file.read_text().strip() if file.is_file() else ""
    facts = RunFacts(uri=uri, experiment=experiment, run_name=run_name, params={}, tags={})
    run_id = open_run(client, facts, known).info.run_id
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
