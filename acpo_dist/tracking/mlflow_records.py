"""Conversion of records to MLflow's names and values, and their delivery."""

import json
import math
import posixpath
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from acpo_dist.tracking.jsonl import plain_number

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

T = TypeVar("T")

ENTITIES_PER_BATCH = 100
"""Params or tags per call; MLflow rejects more."""
METRICS_PER_BATCH = 1000
"""Metrics per call; MLflow rejects more."""
_NAME_LENGTH = 250
_PARAM_LENGTH = 500
_TAG_LENGTH = 5000


class UndeliverableError(Exception):
    """A record that cannot be delivered to any receiver."""


def metrics_record(iteration: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return metrics of one iteration as JSON-compatible data with the current time."""
    values = {legal_name(name): plain_number(value) for name, value in metrics.items()}
    # JSON has no NaN, but MLflow does: NaN is transported as text.
    texts = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
    return {"kind": "metrics", "iteration": iteration, "time_ms": time.time_ns() // 1_000_000, "metrics": texts}


def lane(record: Mapping[str, Any]) -> str:
    """Return the lane of a record; artifacts and metrics may have different servers and do not block each other."""
    return "artifacts" if record.get("kind") in ("image", "text") else "metrics"


def deliver(client: "MlflowClient", run_id: str, record: Mapping[str, Any]) -> None:
    """Send one record; repeated sending changes nothing, since the record has its own time.

    Raises:
        UndeliverableError: the image is missing, or the kind of record is unknown.
        Exception: raised by MLflow.
    """
    from mlflow.entities import Metric, RunTag

    match record:
        case {"kind": "metrics", "iteration": step, "time_ms": when, "metrics": values}:
            metrics = [Metric(name, float(value), when, step) for name, value in values.items()]
            for batch in batches(metrics, METRICS_PER_BATCH):
                client.log_batch(run_id, metrics=batch)
        case {"kind": "image", "path": path}:
            if not Path(path).is_file():
                raise UndeliverableError(f"the image {path} is missing")
            client.log_artifact(run_id, path, "samples")
        case {"kind": "text", "name": name, "text": text}:
            client.log_text(run_id, text, f"config/{name}")
        case {"kind": "tags", "tags": tags}:
            for batch in batches([RunTag(key, value) for key, value in tags.items()], ENTITIES_PER_BATCH):
                client.log_batch(run_id, tags=batch)
        case _:
            raise UndeliverableError(f"not a record of this version: {str(record)[:200]}")


def is_refusal(error: Exception) -> bool:
    """Return whether MLflow rejected the request as invalid, so that a retry cannot succeed."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() == 400
    return isinstance(error, UndeliverableError)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested data to MLflow params: `rewards.train.0.type`, the keys of overrides; long values are cut."""
    flat: dict[str, str] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[legal_name(name)] = str(value)[:_PARAM_LENGTH]
    return flat


def tag_values(tags: Mapping[str, Any]) -> dict[str, str]:
    """Convert facts to MLflow tags: text is unchanged, other values become JSON if possible."""
    texts = {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in tags.items()}
    return {legal_name(key): text[:_TAG_LENGTH] for key, text in texts.items()}


def legal_name(name: str) -> str:
    """Replace characters that MLflow rejects, so that one invalid name does not lose a whole batch."""
    # MLflow allows colons only on some systems, and no name that a file system would normalise.
    legal = re.sub(r"[^\w./ -]", "_", name)[:_NAME_LENGTH]
    return posixpath.normpath(legal).lstrip("./") or "_"


def batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Cut a sequence into lists of at most `size`."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
