"""pyiqa's metrics by name: usable gradients, agreement of the table with pyiqa, and single images."""

import importlib.util

import pytest
import torch
from torch import Tensor

from acpo_dist.core.errors import RewardConfigError
from acpo_dist.data.toy.world import templates
from acpo_dist.rewards.pyiqa_metric import PyiqaMetric
from acpo_dist.workers.reward.worker import RewardWorker

needs_pyiqa = pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="needs pyiqa (optional extra)")


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int) -> Tensor:
    """uint8 images of the toy world under noise."""
    clean = templates()[torch.randperm(864, generator=rng(0))[:count]]
    return ((clean + 0.1 * torch.randn(clean.shape, generator=rng(1))).clamp(0, 1) * 255).to(torch.uint8)


@pytest.mark.parametrize("name", ["piqe", "entropy", "ilniqe", "nrqm", "pi", "qalign"])
def test_metrics_of_pyiqa_without_a_usable_gradient_cannot_drive_an_update(name: str):
    assert not PyiqaMetric.Config(metric=name).differentiable


@pytest.mark.parametrize("name", ["brisque", "niqe", "musiq", "maniqa", "cnniqa", "topiq_nr", "clipiqa+"])
def test_metrics_of_pyiqa_with_a_gradient_can(name: str):
    assert PyiqaMetric.Config(metric=name).differentiable


def test_a_misspelt_metric_of_pyiqa_is_refused_with_a_suggestion():
    with pytest.raises(RewardConfigError, match=r"`musik`.*Did you mean `musiq`"):
        PyiqaMetric(PyiqaMetric.Config(metric="musik"))


def known_to_the_table(name: str) -> bool:
    reason = PyiqaMetric.Config(metric=name).unusable()
    return reason is None or "pyiqa has no" not in reason


@needs_pyiqa
def test_the_table_agrees_with_pyiqa_on_names_and_directions():
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    no_reference = {name: entry for name, entry in DEFAULT_CONFIGS.items() if entry["metric_mode"] == "NR"}
    listed = [name for name in DEFAULT_CONFIGS if known_to_the_table(name)]
    assert len(listed) > 50 and set(listed) <= set(no_reference)
    wanted = {name: -1 if no_reference[name].get("lower_better", False) else 1 for name in listed}
    assert {name: PyiqaMetric.Config(metric=name).direction for name in listed} == wanted


@needs_pyiqa
@pytest.mark.parametrize("name", ["piqe", "entropy"])
def test_metrics_of_pyiqa_that_need_no_download_score_one_image_like_four(name: str):
    config = PyiqaMetric.Config(metric=name)
    served, images_BCHW = RewardWorker(config, model=None, cut="image", wire_dtype="float32"), images(4)
    together = served.score(images_BCHW, [""] * 4)
    alone = [served.score(images_BCHW[i : i + 1], [""])[0] for i in range(4)]
    assert len(set(together)) > 1
    # Sums of float32 over 1024 pixels, of scores up to 100.
    assert together == pytest.approx(alone, abs=1e-3)


@needs_pyiqa
@pytest.mark.parametrize("name", ["piqe", "entropy"])
def test_metrics_listed_without_a_gradient_have_none(name: str):
    import pyiqa

    metric = pyiqa.create_metric(name, as_loss=True, loss_reduction="none")
    images_BCHW = (images(2).float() / 255).requires_grad_(True)
    score = metric(images_BCHW).sum()
    assert not score.requires_grad or not torch.autograd.grad(score, images_BCHW)[0].any()
