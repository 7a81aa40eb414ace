"""MLflow tracker with a sender thread and an on-disk queue: training never waits, and no record is lost."""

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from acpo_dist.core.errors import ConfigError, shorten
from acpo_dist.core.files import replace_file
from acpo_dist.core.ports import Tracker
from acpo_dist.tracking.mlflow_records import deliver, flatten, is_refusal, lane, metrics_record, tag_values
from acpo_dist.tracking.mlflow_run import (
    RunFacts,
    access_advice,
    describe_run,
    make_sqlite,
    open_run,
    shown_uri,
    sqlite_uri,
)
from acpo_dist.tracking.spool import Spool

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
"""Seconds to wait for MLflow when a run ends."""


class MlflowTracker(Tracker):
    """Records a run in MLflow: one MLflow run, also if the run is stopped and resumed.

    Every record is first appended to `<spool>/pending.jsonl`; a daemon thread sends pending records in order and
    removes them. Memory is bounded, and a call writes one line to disk. Records that MLflow did not accept, because it
    was slow or unreachable or the process was killed, are sent with the next record, at `close`, or on resume.

    Args:
        uri: MLflow tracking URI; see `default_uri`.
        experiment: created if it does not exist; with SQLite its artifacts are in `mlartifacts` beside the database.
        run_name: name of a new MLflow run.
        run_id: MLflow run to continue; None continues the one in `<spool>/run_id`, or starts one.
        spool: folder for the run id and for pending records; each run has its own.
        params: the configuration, nested or flat; on a restart only new keys are added, since MLflow params are fixed.
        tags: searchable facts.

    Raises:
        ConfigError: MLflow is not installed; an unreachable server is not an error.
        OSError: the spool folder cannot be used.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        run_id: str | None = None,
        *,
        spool: Path,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
    ) -> None:
        # Not in the thread: an import concurrent with imports of the main thread may see incomplete modules.
        try:
            import mlflow.tracking
        except ImportError as error:
            raise ConfigError(
                "`tracking.mlflow=true` needs MLflow, which cannot be imported "
                f"({error}): pip install 'acpo-dist[mlflow]', or set tracking.mlflow=false."
            ) from error
        self._new_client = mlflow.tracking.MlflowClient
        self._client: MlflowClient | None = None
        self._facts = RunFacts(
            uri=uri, experiment=experiment, run_name=run_name, params=flatten(params), tags=tag_values(tags)
        )
        self._spool = Spool(spool / "pending.jsonl")
        self._id_file = spool / "run_id"
        self._run_id = run_id or (self._id_file.read_text().strip() if self._id_file.exists() else "")
        self._warned = self._failing = False
        self._refused = 0
        self._status: str | None = None
        self._wake = threading.Event()
        self._wake.set()
        self._thread = threading.Thread(target=self._write, name="mlflow-writer", daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        """The tracking URI."""
        return self._facts.uri

    @property
    def run_id(self) -> str | None:
        """The MLflow run id; None until MLflow has responded for the first time."""
        return self._run_id or None

    @override
    def log_metrics(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._put(metrics_record(iteration, metrics))

    @override
    def log_image(self, name: str, iteration: int, path: Path) -> None:
        self._put({"kind": "image", "path": os.path.abspath(path)})

    @override
    def log_text(self, name: str, text: str) -> None:
        self._put({"kind": "text", "name": name, "text": text})

    @override
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._put({"kind": "tags", "tags": tag_values(tags)})

    @override
    def close(self, status: str) -> None:
        if self._status is not None:
            return
        self._status = status
        self._wake.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._refused:
            logger.warning("%d records for MLflow were dropped", self._refused)
        if self._thread.is_alive() or self._failing:
            logger.warning(
                "MLflow at %s did not accept everything: %d records are pending in %s and are sent when the run is "
                "resumed",
                shown_uri(self.uri), len(self._spool), self._spool.path,
            )  # fmt: skip

    def _put(self, record: dict[str, Any]) -> None:
        self._spool.append(record)
        self._wake.set()

    def _write(self) -> None:
        """Body of the thread: one attempt to send all pending records, per record and at the end."""
        status = None
        while status is None:
            self._wake.wait()
            self._wake.clear()
            # Read before the attempt, so that the last attempt includes every record put before `close`.
            status = self._status
            try:
                errors = self._attempt(status)
            except Exception as error:  # MLflow raises the exceptions of its stores, drivers and HTTP libraries
                errors = [error]
            self._report(errors)

    def _attempt(self, status: str | None) -> list[Exception]:
        client = self._client = self._client or self._connect()
        errors = self._spool.drain(lambda record: self._send(client, record), lane)
        if status not in (None, "RUNNING"):
            client.set_terminated(self._run_id, status)
        return errors

    def _connect(self) -> "MlflowClient":
        make_sqlite(self.uri, self._new_client)
        client = self._new_client(tracking_uri=self.uri)
        run = open_run(client, self._facts, self._run_id)
        # Stored before anything else can fail: the next attempt and the next process must find this run again.
        self._run_id = run.info.run_id
        replace_file(self._id_file, run.info.run_id.encode())
        describe_run(client, run, self._facts)
        return client

    def _send(self, client: "MlflowClient", record: dict[str, Any]) -> None:
        try:
            deliver(client, self._run_id, record)
        except Exception as error:
            if not is_refusal(error):
                raise
            self._refused += 1
            if self._refused == 1:
                logger.warning("a record for MLflow was dropped: %s", shown_uri(str(error)))

    def _report(self, errors: list[Exception]) -> None:
        if errors and not self._warned:
            self._warned = True
            said = shorten(f"{type(errors[0]).__name__}: {errors[0]}".partition("\n")[0], 250)
            advice = access_advice(said)
            logger.warning(
                "MLflow at %s cannot be used (%s).%s Training continues; records are kept in %s and sent when it "
                "accepts them.", shown_uri(self.uri), shown_uri(said), f" {advice}" if advice else "", self._spool.path,
            )  # fmt: skip
        elif self._failing and not errors:
            logger.info("MLflow at %s has accepted all pending records", shown_uri(self.uri))
        self._failing = bool(errors)


def default_uri(run_dir: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or else a SQLite database beside the run folder, shared by its neighbours."""
    beside = Path(os.path.abspath(run_dir)).parent / "mlflow.db"
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(beside)
