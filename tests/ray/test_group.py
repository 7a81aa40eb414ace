"""Calls of many workers: a response that never arrives is noticed."""

import asyncio
import time

import pytest

from acpo_dist.core.errors import WorkerLostError

pytest.importorskip("ray", reason="needs the extra `ray`")
from actors import group


class Silent:
    """An actor that answers a later call, but never an earlier one, as one whose response the network has lost."""

    async def train(self) -> None:
        await asyncio.Event().wait()

    async def ping(self) -> None:
        return


class Busy:
    """An actor that executes its calls in order, the first one once its argument has arrived."""

    def train(self, _gate) -> str:
        return "trained"

    def ping(self) -> None:
        return


@pytest.mark.ray
def test_a_lost_response_is_noticed_and_a_late_one_is_awaited(cluster, monkeypatch):
    monkeypatch.setattr(group, "ASK_S", 0.5)
    silent, busy = (cluster.remote(kind).options(num_cpus=0).remote() for kind in (Silent, Busy))
    with pytest.raises(WorkerLostError, match="silent: the response to `train` was lost"):
        group.gather({"silent": silent.train.remote()}, timeout_s=60, what="train", ping=lambda _: silent.ping.remote())
    # Six times as long as the pause between two questions.
    gate = cluster.remote(lambda: time.sleep(3)).options(num_cpus=0).remote()
    found = group.gather(
        {"busy": busy.train.remote(gate)}, timeout_s=60, what="train", ping=lambda _: busy.ping.remote()
    )
    assert found == {"busy": "trained"}
