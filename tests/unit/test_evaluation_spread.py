"""The guard's diversity gauge: insensitive to noise, 0 for a collapse, and the Vendi score in between."""

import numpy as np
import pytest
import torch

from acpo_dist.data.toy.world import templates
from acpo_dist.evaluation.metrics.spread import fit_gauge

IMAGES = templates()[torch.randperm(864, generator=torch.Generator().manual_seed(0))[:64]]
"""Clean images of the toy world, float (64, 3, 32, 32)."""
PROMPTS = [f"prompt {index}" for index in range(64)]


def speckled(images: torch.Tensor, seed: int = 1) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + 0.1 * noise).clamp(0, 1)


def gauge(samples_per_prompt: int = 1, prompts: list[str] = PROMPTS):
    found = fit_gauge(IMAGES, prompts, samples_per_prompt=samples_per_prompt, per_iteration=32)
    assert found is not None
    return found


def test_it_is_the_vendi_score_less_one_of_each_block():
    found = gauge()
    values = IMAGES.reshape(64, 3, 8, 4, 8, 4).mean((3, 5)).flatten(1).double().numpy()
    wanted, distances = [], []
    for rows in (values[:32], values[32:]):
        square = ((rows[:, None] - rows[None]) ** 2).sum(2)
        distances.append(np.sqrt(square[np.triu_indices(32, 1)]))
        share = np.linalg.eigvalsh(np.exp(-square / (2 * found.bandwidth**2)) / 32)
        wanted.append(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()) - 1)
    assert found.bandwidth == pytest.approx(float(np.median(np.concatenate(distances))), rel=1e-6)
    assert found.measure(IMAGES, PROMPTS) == pytest.approx(np.mean(wanted), rel=1e-6)


def test_a_collapse_to_one_image_is_0_with_and_without_speckle():
    found = gauge()
    one = IMAGES[:1].expand(32, -1, -1, -1)
    assert found.measure(one, PROMPTS[:32]) == pytest.approx(0, abs=1e-9)
    base, fallen = found.measure(IMAGES, PROMPTS), found.measure(speckled(one), PROMPTS[:32])
    assert base is not None and fallen is not None and fallen < 0.15 * base


def test_speckle_alone_is_no_diversity():
    found = gauge()
    base, noisy = found.measure(IMAGES, PROMPTS), found.measure(speckled(IMAGES), PROMPTS)
    assert noisy == pytest.approx(base, rel=0.1)


def test_samples_of_one_prompt_are_compared_with_each_other_alone():
    prompts = [f"prompt {index // 4}" for index in range(64)]
    found = gauge(4, prompts)
    # Every prompt has fallen to an image of its own: different images, but none within a prompt.
    fallen = IMAGES[::4].repeat_interleave(4, 0)
    assert found.block == 4 and found.by_prompt
    assert found.measure(fallen, prompts) == pytest.approx(0, abs=1e-9)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = found.measure(IMAGES[sorted(order)], prompts)
    assert shuffled == pytest.approx(found.measure(IMAGES, prompts))


@pytest.mark.parametrize(
    ("images", "count"),
    [(IMAGES[:1], 1), (IMAGES[:1].expand(8, -1, -1, -1), 8), (IMAGES[:8, :, :4, :4], 8)],
    ids=["one image", "all alike", "a few pixels"],
)
def test_where_nothing_can_be_compared_there_is_no_gauge(images: torch.Tensor, count: int):
    assert fit_gauge(images, PROMPTS[:count], samples_per_prompt=1, per_iteration=8) is None


def test_fewer_images_than_a_block_are_not_measured():
    assert gauge().measure(IMAGES[:31], PROMPTS[:31]) is None
