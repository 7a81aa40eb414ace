"""A reward plug-in with a mistake ends a run with one message that names the reward."""

import pytest
import torch

from acpo_dist.core.errors import AcpoError, RewardConfigError, RewardError
from acpo_dist.tracking.console import Console
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive
from acpo_dist.workers.reward.wire import pack
from acpo_dist.workers.reward.worker import NonFiniteScoreError, RewardWorker
from tests.helpers.faulty_reward import FaultyReward

IMAGES = (torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
PLUGIN = "tests.helpers.faulty_reward:FaultyReward"


def worker(fault: str) -> RewardWorker:
    config = FaultyReward.Config(name="mine", fault=fault)
    return RewardWorker(config, model=None, cut="image", wire_dtype="float32")


@pytest.mark.parametrize(
    ("fault", "found"),
    [("scalar", "shape ()"), ("column", "(2, 1)"), ("list", "list"), ("integers", "int64"), ("meta", "device meta")],
)
def test_a_metric_that_does_not_return_one_float_per_image_is_named_with_what_it_returned(fault: str, found: str):
    for call in (
        lambda: worker(fault).score(IMAGES, ["", ""]),
        lambda: worker(fault).value_and_grad(pack(IMAGES / 255, "float32"), ["", ""]),
    ):
        with pytest.raises(RewardError) as error:
            call()
        assert "`mine`" in str(error.value) and found in str(error.value) and "shape (2,)" in str(error.value)


def test_a_metric_that_raises_on_its_third_call_is_named_with_its_exception_and_line():
    served = worker("third_call")
    for _ in range(2):
        served.score(IMAGES, ["", ""])
    with pytest.raises(RewardError) as error:
        served.score(IMAGES, ["", ""])
    assert all(part in str(error.value) for part in ("`mine`", "KeyError", "embedding", "faulty_reward.py:"))


def test_a_metric_that_cannot_be_built_is_named_with_its_exception():
    with pytest.raises(RewardConfigError) as error:
        worker("init")
    assert all(part in str(error.value) for part in ("`mine`", PLUGIN, "KeyError", "backbone"))


@pytest.mark.parametrize("fault", ["constant", "detached"])
def test_scores_without_a_gradient_are_named_and_still_serve_a_judge(fault: str):
    assert len(worker(fault).score(IMAGES, ["", ""])) == 2
    with pytest.raises(RewardError) as error:
        worker(fault).value_and_grad(pack(IMAGES / 255, "float32"), ["", ""])
    assert "`mine`" in str(error.value) and "rewards.judges" in str(error.value)


def test_nan_of_a_finite_image_is_named_and_float64_is_taken():
    with pytest.raises(NonFiniteScoreError, match="`mine`"):
        worker("nan").score(IMAGES, ["", ""])
    assert worker("float64").score(IMAGES, ["", ""]) == pytest.approx(worker("none").score(IMAGES, ["", ""]))


@pytest.mark.parametrize("fault", ["constant", "nan", "scalar", "third_call", "init"])
def test_a_run_in_one_process_with_a_faulty_reward_ends_with_an_error_that_names_it(fault: str, tiny, tmp_path):
    train = f'[{{"type": "{PLUGIN}", "name": "mine", "fault": "{fault}"}}]'
    config = tiny(
        f"rewards.train={train}", "rewards.judges=[]", "run.iterations=1", f"run.dir={tmp_path / 'run'}",
        "learner.max_skipped_steps=0",
    )  # fmt: skip
    with pytest.raises(AcpoError) as error:
        drive(config, open_ports, Console(quiet=True))
    assert "`mine`" in str(error.value) and len(str(error.value)) <= 600


def test_a_constant_reward_moves_no_weight_and_is_reported(tiny, tmp_path):
    train = f'[{{"type": "{PLUGIN}", "name": "mine", "fault": "flat"}}]'
    config = tiny(f"rewards.train={train}", "rewards.judges=[]", "run.iterations=1", f"run.dir={tmp_path / 'run'}")
    with pytest.raises(AcpoError) as error:
        drive(config, open_ports, Console(quiet=True))
    assert "`mine`" in str(error.value) and len(str(error.value)) <= 600
