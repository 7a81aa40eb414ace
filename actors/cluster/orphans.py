"""Which run an application of the reward pool belongs to: Serve keeps it when the process that began it dies."""

import ray
from ray import serve
from ray._private import state
from ray.experimental import internal_kv


def own(application: str) -> None:
    """Note, before it is started, that an application belongs to this process."""
    internal_kv._internal_kv_put(_key(application), ray.get_runtime_context().get_job_id().encode(), overwrite=True)


def forget(application: str) -> None:
    """The application is ended."""
    internal_kv._internal_kv_del(_key(application))


def orphans() -> list[str]:
    """Applications whose process has ended without ending them: it was killed, or its machine was lost.

    An application of which nothing is known, such as somebody else's, is none.
    """
    ended = {job["JobID"] for job in state.jobs() if job["IsDead"]}
    owners = {name: internal_kv._internal_kv_get(_key(name)) for name in serve.status().applications}
    return [name for name, owner in owners.items() if owner and owner.decode() in ended]


def _key(application: str) -> bytes:
    return f"acpo/{application}/owner".encode()
