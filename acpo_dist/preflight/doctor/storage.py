"""Check storage: runs, the tracking store and downloaded models."""

import base64
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

from acpo_dist.core.errors import shorten
from acpo_dist.preflight.doctor.finding import Finding, judged
from acpo_dist.tracking.mlflow_run import access_advice

_GIB = 2**30
_LEAST_GIB = 5.0
_ANSWER_S = 10.0
_API = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
"""A request as a run sends it: MLflow answers `/health` whatever host name and account are given."""
_BODY = 2000


def check_runs(folder: Path, needed_gib: float = _LEAST_GIB) -> Iterator[Finding]:
    """Check that runs can be written and renamed in a folder, and that it has enough free space.

    Args:
        folder: folder of the runs.
        needed_gib: free space in GiB below which the finding is a warning.
    """
    there = _existing(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".acpo-doctor-", dir=there) as probe:
            # The same steps as for a checkpoint: write, flush to disk, rename into place.
            begun = Path(probe) / "begun"
            with begun.open("wb") as file:
                file.write(b"\0" * 2**20)
                file.flush()
                os.fsync(file.fileno())
            os.replace(begun, Path(probe) / "whole")
    except OSError as error:
        advice = "Set ACPO_RUNS or run.dir to a folder of your own."
        yield Finding("runs", "failed", f"{there} cannot be written: {error.strerror}", advice)
        return
    free = shutil.disk_usage(there).free / _GIB
    yield judged(
        free >= needed_gib, "runs", f"{folder}, {free:.1f} GiB free",
        f"About {needed_gib:.1f} GiB are required: free some space, set ACPO_RUNS, or lower checkpoint.keep.",
    )  # fmt: skip


def check_tracking(uri: str) -> Iterator[Finding]:
    """Check that the tracking store is reachable, or can be created."""
    kind = urlparse(uri)
    shown = kind._replace(netloc=kind.netloc.rpartition("@")[2]).geturl()
    if kind.scheme in ("http", "https"):
        yield _ask(uri, shown)
    elif kind.scheme == "sqlite":
        path = Path(uri.removeprefix("sqlite:///"))
        writable = os.access(path if path.exists() else _existing(path.parent), os.W_OK)
        yield judged(
            writable, "tracking", f"{path}, {'exists' if path.exists() else 'the first run creates it'}",
            "It cannot be written: set tracking.mlflow_uri or MLFLOW_TRACKING_URI.",
        )  # fmt: skip
    else:
        yield Finding("tracking", "note", f"{shown} is not checked")


def _ask(uri: str, shown: str) -> Finding:
    kind = urlparse(uri)
    account, _, where = kind.netloc.rpartition("@")
    asked = urllib.request.Request(f"{kind._replace(netloc=where).geturl().rstrip('/')}{_API}")
    if given := _authorization(unquote(account)):
        asked.add_header("Authorization", given)
    try:
        with urllib.request.urlopen(asked, timeout=_ANSWER_S) as answer:
            return Finding("tracking", "ok", f"{shown} answers with {answer.status}")
    except urllib.error.HTTPError as error:
        said = error.read(_BODY).decode(errors="replace")
        if "RESOURCE_DOES_NOT_EXIST" in said:
            return Finding("tracking", "ok", f"{shown} answers")
        found = shorten(f"{shown} answers with {error.code} {error.reason}: {said}", 300)
        advice = access_advice(f"{error.code} {said}") or "Is this the address of an MLflow server?"
    except OSError as error:
        found = f"{shown} does not answer: {getattr(error, 'reason', error)}"
        advice = "A run continues without it and sends pending records later; check that its server is running."
    except (http.client.HTTPException, ValueError) as error:
        # The error text may contain the address with its password.
        found, advice = (
            f"{shown} is no address that can be reached ({type(error).__name__})",
            "See tracking.mlflow_uri.",
        )
    return Finding("tracking", "warning", found, advice)


def _authorization(account: str) -> str:
    """Header with the account of the address or of the variables that MLflow reads; empty without one."""
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    if account or user:
        return f"Basic {base64.b64encode((account or f'{user}:{password}').encode()).decode()}"
    token = os.environ.get("MLFLOW_TRACKING_TOKEN", "")
    return f"Bearer {token}" if token else ""


def check_hub() -> Iterator[Finding]:
    """Check the model cache, and whether the hub is in offline mode."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    there = _existing(cache)
    offline = "; HF_HUB_OFFLINE is set, so nothing is downloaded" if constants.HF_HUB_OFFLINE else ""
    token = "; a token is set" if get_token() else ""
    free = shutil.disk_usage(there).free / _GIB
    yield judged(
        os.access(there, os.W_OK), "model cache", f"{cache}, {free:.1f} GiB free{offline}{token}",
        "It cannot be written, so nothing can be downloaded: set HF_HOME.",
    )  # fmt: skip


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest existing parent."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())
