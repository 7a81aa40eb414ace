"""One local Ray cluster for all tests of this folder that a pytest process runs."""

import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import forked

_FORKS = pytest.StashKey[tuple[str, int]]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Let all processes of pytest-xdist share one server, which imports while they collect tests."""
    if _FORKS not in node.config.stash:
        stack = contextlib.ExitStack()
        node.config.add_cleanup(stack.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        node.config.stash[_FORKS] = stack.enter_context(forked.serving(folder))
    node.workerinput["forks"] = node.config.stash[_FORKS]


@pytest.fixture(scope="session")
def forks(request, tmp_path_factory):
    """Program that Ray starts workers with, and the process whose children they are then, in all pytest processes."""
    if shared := getattr(request.config, "workerinput", {}).get("forks"):
        forked.wait_until_ready(shared[0])
        yield tuple(shared)
        return
    with forked.serving(tmp_path_factory.mktemp("forked")) as found:
        forked.wait_until_ready(found[0])
        yield found


@pytest.fixture(scope="session")
def cluster(forks, tmp_path_factory):
    """A local cluster with four logical CPUs, whatever the machine has; its ports and folder are its own."""
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    with pytest.MonkeyPatch.context() as environment, pytest.MonkeyPatch.context() as patch:
        from actors.cluster.connect import PATIENT, unused_port
        from actors.ray_private import agents_not_awaited

        # Workers inherit it at the start: converted single files must not land in the user's own cache.
        environment.setenv("ACPO_CACHE", str(tmp_path_factory.mktemp("converted")))
        patch.setattr(sys, "executable", forks[0])
        # `local`: RAY_ADDRESS may name a cluster that other processes use. Ray would end its start on a busy machine.
        with agents_not_awaited(unused_port()):
            ray.init(
                address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
                namespace="acpo", object_store_memory=300_000_000, _system_config=PATIENT,
            )  # fmt: skip
        patch.undo()
        yield ray
        ray.shutdown()


@pytest.fixture
def ports_of(cluster):
    """Open the Ray ports of a configuration on that cluster; closed after the test."""
    from contextlib import ExitStack

    from acpo_dist.tracking.composite import CompositeTracker
    from actors.launch import open_ports

    with ExitStack() as stack:
        yield lambda config: stack.enter_context(open_ports(config, CompositeTracker([])))


@pytest.fixture(scope="module")
def pool_of(cluster) -> Iterator[Callable]:
    """Deploy the rewards of a configuration; ended after the module."""
    from acpo_dist.config.load import load_config
    from actors.reward.pool import deploy
    from tests.conftest import TINY

    with contextlib.ExitStack() as stack:

        def deployed(run_id: str, rewards: dict):
            # Text keys take a value literally; numbers, lists and mappings are read as YAML.
            given = {key: v if isinstance(v, str) else json.dumps(v) for key, v in rewards.items()}
            config = load_config("toy_sdxl", [*TINY, *(f"rewards.{key}={v}" for key, v in given.items())])
            pool = deploy(config, run_id)
            stack.callback(pool.close)
            return pool

        yield deployed
