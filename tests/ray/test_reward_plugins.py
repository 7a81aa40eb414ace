"""A reward plug-in with a mistake on Ray: the error names the reward, as in one process."""

import json

import pytest
import torch

from acpo_dist.core.errors import AcpoError
from acpo_dist.core.types import RolloutHandle

pytestmark = pytest.mark.ray
PLUGIN = "tests.helpers.faulty_reward:FaultyReward"


def deployed(tiny, fault: str, run_id: str):
    from actors.reward.pool import deploy

    train = json.dumps([{"type": PLUGIN, "name": "mine", "fault": fault}])
    return deploy(
        tiny(f"rewards.train={train}", "rewards.judges=[]", "rewards.cut=image", "rewards.cpus_per_replica=0.1"), run_id
    )


def test_a_plugin_that_raises_on_its_third_call_is_named_with_its_exception(cluster, tiny):
    # The replica itself scores its canary twice.
    pool = deployed(tiny, "third_call", "acpo-00000011")
    images = torch.zeros(2, 3, 40, 40, dtype=torch.uint8)
    handle = RolloutHandle(
        sample_ids=("a", "b"), prompts=("", ""), policy_version=0, schedule_id="", payload=(None, cluster.put(images))
    )
    try:
        with pytest.raises(AcpoError) as error:
            pool.score([handle], ["mine"])
    finally:
        pool.close()
    assert all(part in str(error.value) for part in ("`mine`", "KeyError", "embedding"))
    assert len(str(error.value)) <= 600


def test_a_plugin_that_cannot_score_ends_the_start_of_the_pool_with_its_name(cluster, tiny):
    with pytest.raises(AcpoError) as error:
        deployed(tiny, "nan", "acpo-00000012")
    assert "`mine`" in str(error.value) and "not finite" in str(error.value) and len(str(error.value)) <= 600
