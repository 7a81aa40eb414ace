"""Applications of the reward pool whose run has ended: Serve keeps an application when its driver process dies."""

import ray
from ray import serve

from actors.ray_private import delete_key, ended_jobs, read_key, write_key


def own(application: str) -> None:
    """Record, before it is started, that an application belongs to this process."""
    write_key(_key(application), ray.get_runtime_context().get_job_id())


def forget(application: str) -> None:
    """Delete the record of an application that has ended."""
    delete_key(_key(application))


def orphans() -> list[str]:
    """Return applications whose driver process ended without ending them: it was killed, or its machine was lost.

    An application without a record, such as one of another program, is left out.
    """
    ended = ended_jobs()
    owners = {name: read_key(_key(name)) for name in serve.status().applications}
    return [name for name, owner in owners.items() if owner in ended]


def _key(application: str) -> str:
    return f"acpo/{application}/owner"
