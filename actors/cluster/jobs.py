"""Runs as Ray jobs: what is uploaded, and a thin hold on Ray's own job service."""

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
"""Where `ray dashboard cluster.yaml` puts a cluster's job service."""
EXCLUDES = (
    ".git", ".venv", "venv", "node_modules", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", "*.egg-info",
    "runs", "mlruns", "mlartifacts", "mlflow.db*", "build", "dist", "*.pt", "*.ckpt", ".env", ".env.*",
    ".ssh", ".aws", ".azure", ".gcloud", ".config", ".kube", ".docker", ".gnupg", ".ray", ".cache", ".local", ".netrc",
    ".git-credentials", ".pypirc", ".npmrc", ".huggingface", ".password-store", "*.pem", "*.key", "id_rsa*", "id_dsa*",
    "id_ecdsa*", "id_ed25519*", "auth_token*", "*_history",
)  # fmt: skip
"""Never uploaded: what is made again, what is large, and what may hold secrets. `.gitignore` counts too."""
OWN_CODE = ("/acpo_dist", "/actors", "/tests", "/docs", "/benchmarks")
"""A checkout of this project is not uploaded unasked: the machines have it installed, and two versions must not mix."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Files that travel with a job."""

    folder: Path
    excludes: tuple[str, ...]
    only: tuple[str, ...] = ()
    """Files and folders within `folder` that travel alone; empty for all that is not excluded."""

    @contextmanager
    def runtime_env(self) -> Iterator[dict[str, Any]]:
        """In Ray's words, for as long as it takes to upload."""
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
    """How the job will call its configuration, and what has to be uploaded for that.

    Args:
        source: what `acpo train` takes: a file, or the name of a shipped configuration.
        folder: what to upload; None takes the current folder if the file lies in it, else the file's own. A shipped
            configuration needs nothing.

    Raises:
        UsageError: the folder does not hold the file, or is a home folder that nobody has named.
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
        raise UsageError(f"{file} is not in --working-dir {root}, so the job would not find it; name a folder above it")
    return str(file.relative_to(root)), Upload(folder=root, excludes=excludes)


def _no_home(folder: Path | None, implied: Path | None = None) -> Path:
    """The named folder, else the implied one, which must not be one that holds a user's keys and everything else."""
    if folder is not None:
        return folder.resolve()
    root, home = (implied or Path.cwd()).resolve(), Path.home().resolve()
    if home.is_relative_to(root):
        raise UsageError(
            f"all of {root} would be uploaded. Put the configuration and what it names into a folder of their own, or "
            "say --working-dir if that is what you want."
        )
    return root


def with_files(upload: Upload | None, files: Mapping[str, str]) -> Upload | None:
    """The upload, held against what the job will look for in it; a shipped configuration takes just these files along.

    Args:
        files: key of the configuration -> relative path, as `relative_files` finds them.

    Raises:
        UsageError: the job would not find one of them.
    """
    here = Path.cwd().resolve()
    folder = upload.folder if upload else here
    for key, name in files.items():
        file = (folder / name).resolve()
        where = "the folder that is uploaded" if upload else "this folder, from where it would be uploaded"
        shared = "Put it there, or give its absolute path on storage that all machines share."
        if not file.is_relative_to(folder) or not file.exists():
            raise UsageError(f"{key}={name} is not in {where}, {folder}, so the job would not find it. {shared}")
        if upload and not _travels(upload, file):
            raise UsageError(
                f"{key}={name} is not uploaded: .gitignore, .rayignore or the list of what never is (weights, runs, "
                f"keys) leaves it out of {folder}, so the job would not find it. Give its absolute path on storage "
                "that all machines share."
            )
    if upload is None and files:
        return Upload(folder=here, excludes=(), only=tuple(dict.fromkeys(files.values())))
    return upload


def _travels(upload: Upload, file: Path) -> bool:
    from actors.ray_private import is_uploaded

    return is_uploaded(file, upload.folder, list(upload.excludes))


def connect(address: str | None) -> Any:
    """Ray's job client; the token is read by Ray itself (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or its default file).

    Raises:
        UsageError: nobody answers there, or the token is missing or wrong.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    try:
        return JobSubmissionClient(where)
    except AuthenticationError as error:
        raise UsageError(
            f"the cluster at {where} wants its token: {str(error).splitlines()[0]} {TOKEN_HELP}"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"no job service at {where} ({error}). Forward the cluster's with `ray dashboard cluster.yaml`, or name "
            "another with --address or RAY_API_SERVER_ADDRESS."
        ) from error


def submit(
    client: Any, arguments: Sequence[str], *, upload: Upload | None, env: Mapping[str, str], job: str | None = None,
    cpus: float = 0.0, gpus: float = 0.0,
) -> str:  # fmt: skip
    """Start `acpo train ARGUMENTS` as a job; its name.

    Args:
        cpus: what the driver itself takes; more than 0 lets Ray put it on another machine than the head.
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
        raise UsageError(f"the job was not taken: {error}") from error


def follow(client: Any, job: str, write: Callable[[str], Any]) -> str:
    """Pass a job's output on until it ends; how it ended, in Ray's words: SUCCEEDED, FAILED or STOPPED.

    Raises:
        WorkerError: the job service is gone before the job has ended.
    """

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            write(text)

    try:
        asyncio.run(tail())
        return str(client.get_job_status(job).value)
    except (ConnectionError, OSError, RuntimeError) as error:
        raise WorkerError(
            f"lost sight of {job} ({error}); it may well go on. Look again with `acpo submit --logs {job}`."
        ) from error


def require_job(client: Any, job: str) -> dict[str, Any]:
    """Facts of one job.

    Raises:
        UsageError: there is no such job.
    """
    found = [one for one in list_jobs(client) if one["job"] == job]
    if not found:
        raise UsageError(f"no job `{job}` on this cluster; `acpo submit --list` shows them")
    return found[0]


def list_jobs(client: Any) -> list[dict[str, Any]]:
    """Facts of all submitted jobs, newest first; times in seconds since 1970."""
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
