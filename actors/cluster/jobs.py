"""Runs as Ray jobs: selection of uploaded files, and calls to Ray's job service."""

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from acpo_dist.core.errors import UsageError, WorkerError
from actors.cluster.connect import TOKEN_HELP

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
"""Address to which `ray dashboard cluster.yaml` forwards a cluster's job service."""
EXCLUDES = (
    ".git", ".venv", "venv", "node_modules", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", "*.egg-info",
    "runs", "mlruns", "mlartifacts", "mlflow.db*", "build", "dist", "*.pt", "*.ckpt", ".env", ".env.*",
    ".ssh", ".aws", ".azure", ".gcloud", ".config", ".kube", ".docker", ".gnupg", ".ray", ".cache", ".local", ".netrc",
    ".git-credentials", ".pypirc", ".npmrc", ".huggingface", ".password-store", "*.pem", "*.key", "id_rsa*", "id_dsa*",
    "id_ecdsa*", "id_ed25519*", "auth_token*", "*_history",
)  # fmt: skip
"""Never uploaded: generated files, large files and possible secrets, in addition to the patterns of `.gitignore`."""
OWN_CODE = ("/acpo_dist", "/actors", "/tests", "/docs", "/benchmarks")
"""This project's own code is uploaded only on request: it is installed on the machines, and versions must match."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Files that are uploaded with a job."""

    folder: Path
    excludes: tuple[str, ...]
    only: tuple[str, ...] = ()
    """Files and folders within `folder` that are uploaded; empty for all that are not excluded."""

    @contextmanager
    def runtime_env(self) -> Iterator[dict[str, Any]]:
        """Context with Ray's runtime environment; staged copies exist during the block."""
        if not self.only:
            yield {"working_dir": str(self.folder), "excludes": list(self.excludes)}
            return
        with TemporaryDirectory() as staged:
            for name in self.only:
                source, target = self.folder / name, Path(staged, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target, dirs_exist_ok=True)
                else:
                    shutil.copy2(source, target)
            yield {"working_dir": staged}


def plan_upload(source: str, folder: Path | None, *, ship_code: bool = False) -> tuple[str, Upload | None]:
    """Return the configuration's name within the job, and the upload that it needs.

    Args:
        source: a configuration file, or the name of a shipped configuration.
        folder: folder to upload; None uses the current folder if the file is in it, else the file's own. A shipped
            configuration needs none.

    Raises:
        UsageError: the folder does not contain the file, or would be a home folder that was not given explicitly.
    """
    excludes = EXCLUDES if ship_code else EXCLUDES + OWN_CODE
    file = Path(source)
    if not file.is_file():
        if folder is None and not ship_code:
            return source, None
        return source, Upload(folder=_no_home(folder), excludes=excludes)
    file, here = file.resolve(), Path.cwd().resolve()
    root = _no_home(folder, here if file.is_relative_to(here) else file.parent)
    if not file.is_relative_to(root):
        raise UsageError(f"{file} is not in --working-dir {root}, so the job would not find it; name its folder")
    return str(file.relative_to(root)), Upload(folder=root, excludes=excludes)


def _no_home(folder: Path | None, implied: Path | None = None) -> Path:
    """Return the given folder, else the implied one, unless that contains the user's home folder."""
    if folder is not None:
        return folder.resolve()
    root, home = (implied or Path.cwd()).resolve(), Path.home().resolve()
    if home.is_relative_to(root):
        raise UsageError(
            f"all of {root} would be uploaded. Move the configuration and the files that it names into a separate "
            "folder, or set the folder with --working-dir."
        )
    return root


def with_files(upload: Upload | None, files: Mapping[str, str]) -> Upload | None:
    """Check that an upload contains the files that the job reads; a shipped configuration uploads only these files.

    Args:
        upload: files of the job.
        files: key of the configuration -> relative path, result of `relative_files`.

    Raises:
        UsageError: the job would not find one of them.
    """
    here = Path.cwd().resolve()
    folder = upload.folder if upload else here
    for key, name in files.items():
        file = (folder / name).resolve()
        where = "the folder that is uploaded" if upload else "this folder, which would be uploaded"
        shared = "Move it there, or give its absolute path on storage that all machines share."
        if not file.is_relative_to(folder) or not file.exists():
            raise UsageError(f"{key}={name} is not in {where}, {folder}, so the job would not find it. {shared}")
        if upload and not _is_uploaded(upload, file):
            raise UsageError(
                f"{key}={name} is not uploaded: .gitignore, .rayignore or the built-in list (weights, runs, keys) "
                f"excludes it from {folder}, so the job would not find it. Give its absolute path on storage "
                "that all machines share."
            )
    if upload is None and files:
        return Upload(folder=here, excludes=(), only=tuple(dict.fromkeys(files.values())))
    return upload


def _is_uploaded(upload: Upload, file: Path) -> bool:
    from actors.ray_private import is_uploaded

    return is_uploaded(file, upload.folder, list(upload.excludes))


def connect(address: str | None) -> Any:
    """Return Ray's job client; Ray itself reads the token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or its default file).

    Raises:
        UsageError: there is no job service, or the token is missing or wrong.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    try:
        return JobSubmissionClient(where)
    except AuthenticationError as error:
        raise UsageError(
            f"the cluster at {where} requires its token: {str(error).splitlines()[0]} {TOKEN_HELP}"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"no job service at {where} ({error}). Forward the cluster's with `ray dashboard cluster.yaml`, or set "
            "another address with --address or RAY_API_SERVER_ADDRESS."
        ) from error


def submit(
    client: Any, arguments: Sequence[str], *, upload: Upload | None, env: Mapping[str, str], job: str | None = None,
    cpus: float = 0.0, gpus: float = 0.0,
) -> str:  # fmt: skip
    """Start `acpo train ARGUMENTS` as a job and return its name.

    Args:
        client: from `connect`.
        upload: files for the job, or None.
        env: environment variables of the job.
        job: its name; None lets Ray choose.
        cpus: CPUs of the driver; more than 0 lets Ray place it on another machine than the head.
        gpus: GPUs of the driver.

    Raises:
        UsageError: the job service rejects the job.
    """
    import shlex

    variables = {"env_vars": dict(env)} if env else {}
    try:
        with upload.runtime_env() if upload else nullcontext({}) as files:
            return client.submit_job(
                entrypoint=shlex.join(["acpo", "train", *arguments]), runtime_env={**files, **variables} or None,
                submission_id=job, entrypoint_num_cpus=cpus or None, entrypoint_num_gpus=gpus or None,
                metadata={"acpo": "train", "config": arguments[0]},
            )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the job service rejected the job: {error}") from error


def follow(client: Any, job: str, write: Callable[[str], Any]) -> str:
    """Pass a job's output to `write` until the job ends; returns Ray's status: SUCCEEDED, FAILED or STOPPED.

    Raises:
        WorkerError: the connection to the job service was lost before the job has ended.
    """

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            write(text)

    try:
        asyncio.run(tail())
        return str(client.get_job_status(job).value)
    except (ConnectionError, OSError, RuntimeError) as error:
        raise WorkerError(
            f"lost the connection to {job} ({error}); the job may still run. See `acpo submit --logs {job}`."
        ) from error


def require_job(client: Any, job: str) -> dict[str, Any]:
    """Return the properties of one job.

    Raises:
        UsageError: the job does not exist.
    """
    found = [one for one in list_jobs(client) if one["job"] == job]
    if not found:
        raise UsageError(f"no job `{job}` on this cluster; `acpo submit --list` shows them")
    return found[0]


def list_jobs(client: Any) -> list[dict[str, Any]]:
    """Return the properties of all submitted jobs, newest first; times in seconds since 1970."""
    jobs = [one for one in client.list_jobs() if one.submission_id]
    return [
        {
            "job": one.submission_id, "status": str(one.status.value), "entrypoint": one.entrypoint,
            "started": one.start_time / 1000 if one.start_time else None,
            "ended": one.end_time / 1000 if one.end_time else None,
            "message": (one.message or "").splitlines()[0] if one.message else "",
        }
        for one in sorted(jobs, key=lambda one: one.start_time or 0, reverse=True)
    ]  # fmt: skip
