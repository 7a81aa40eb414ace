"""Advantages are relative to the group, and every excluded sample is counted once."""

import dataclasses
import math
import statistics

import pytest
import torch

from acpo_dist.objective.advantage import AdvantageCounts, constant_images, group_advantages

GROUP = ("a", "b", "c", "d")


def one_evaluator(*values: float, names: tuple[str, ...] = GROUP) -> dict[str, dict[str, float]]:
    return {"iqa": dict(zip(names, values, strict=True))}


def test_advantages_are_standard_deviations_from_the_groups_mean():
    values = [0.3, -1.2, 2.0, 0.5]
    found = group_advantages([GROUP], one_evaluator(*values), {"iqa": 2.0})
    mean, std = statistics.fmean(values), statistics.pstdev(values)
    assert [found.values[name] for name in GROUP] == pytest.approx([(v - mean) / std for v in values], rel=1e-6)


def test_groups_do_not_see_each_other():
    first, second = ("a", "b"), ("c", "d")
    found = group_advantages([first, second], one_evaluator(1.0, 2.0, 101.0, 102.0), {"iqa": 1.0})
    assert [found.values[name] for name in GROUP] == pytest.approx([-1, 1, -1, 1], rel=1e-6)
    assert found.groups == (first, second)


def test_several_evaluators_add_up_by_weight():
    qualities = {"iqa": dict(a=0.0, b=1.0, c=0.0, d=1.0), "text": dict(a=0.0, b=0.0, c=3.0, d=3.0)}
    found = group_advantages([GROUP], qualities, {"iqa": 3.0, "text": 1.0}, veto=False)
    rewards = [0.0, 3.0, 3.0, 6.0]
    wanted = [(r - 3.0) / statistics.pstdev(rewards) for r in rewards]
    assert [found.values[name] for name in GROUP] == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_an_outlier_is_clipped_and_the_unit_advantage_stays_within_one():
    names = tuple(f"s{index}" for index in range(50))
    found = group_advantages([names], one_evaluator(*[0.0] * 49, 1.0, names=names), {"iqa": 1.0}, limit=5.0)
    assert found.values["s49"] == 5.0 and found.unit("s49") == 1.0
    assert found.unit("s0") == pytest.approx(-1 / 7 / 5, rel=1e-6)


def test_groups_with_equal_rewards_are_dropped_and_counted():
    found = group_advantages([("a", "b"), ("c", "d")], one_evaluator(1.0, 1.0 + 1e-4, 0.0, 1.0), {"iqa": 1.0})
    assert set(found.values) == {"c", "d"}
    assert (found.counts.flat_groups, found.counts.in_dropped_groups) == (1, 2)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_costs_its_own_sample_alone(broken: float):
    found = group_advantages([GROUP], one_evaluator(1.0, broken, 2.0, 3.0), {"iqa": 1.0})
    wanted = group_advantages([("a", "c", "d")], one_evaluator(1.0, 0.0, 2.0, 3.0), {"iqa": 1.0})
    assert found.values == wanted.values and found.counts.non_finite == 1


def test_an_evaluator_without_weight_can_still_break_a_sample():
    qualities = one_evaluator(1.0, 2.0, 3.0, 4.0) | {"judge": dict(a=0.0, b=math.nan, c=1.0, d=2.0)}
    assert set(group_advantages([GROUP], qualities, {"iqa": 1.0}).values) == {"a", "c", "d"}


def test_a_group_with_one_usable_sample_is_dropped():
    found = group_advantages([("a", "b"), ("c", "d")], one_evaluator(1.0, math.nan, 0.0, 1.0), {"iqa": 1.0})
    assert set(found.values) == {"c", "d"}
    assert (found.counts.small_groups, found.counts.in_dropped_groups, found.counts.non_finite) == (1, 1, 1)


def test_samples_on_which_evaluators_disagree_are_vetoed_but_stay_in_the_mean():
    # Both like d and dislike a; b and c split them.
    qualities = {"iqa": dict(a=-2.0, b=-1.0, c=1.0, d=2.0), "text": dict(a=-2.0, b=1.0, c=-1.0, d=2.0)}
    found = group_advantages([GROUP], qualities, {"iqa": 2.0, "text": 1.0}, veto=True)
    assert set(found.values) == {"a", "d"} and found.counts.disagreeing == 2
    kept = group_advantages([GROUP], qualities, {"iqa": 2.0, "text": 1.0}, veto=False)
    assert set(kept.values) == set(GROUP) and kept.counts.disagreeing == 2
    assert found.values == {name: kept.values[name] for name in ("a", "d")}


def test_a_faint_vote_is_no_disagreement():
    qualities = {"iqa": dict(a=-1.0, b=-1.0, c=1.0, d=1.0), "text": dict(a=-9.0, b=0.1, c=-0.1, d=9.0)}
    loud = group_advantages([GROUP], qualities, {"iqa": 1.0, "text": 1.0}, min_vote=0.1)
    assert loud.counts.disagreeing == 0
    assert group_advantages([GROUP], qualities, {"iqa": 1.0, "text": 1.0}).counts.disagreeing == 2


def test_an_evaluator_without_spread_in_the_group_does_not_vote():
    # 0.1 three times: the mean is off by a rounding error, which must not turn into a vote.
    names = ("a", "b", "c")
    qualities = {"iqa": dict(a=-1.0, b=0.0, c=1.0), "flat": dict.fromkeys(names, 0.1)}
    assert group_advantages([names], qualities, {"iqa": 1.0, "flat": 1.0}).counts.disagreeing == 0


def test_a_group_whose_every_sample_is_vetoed_leaves_no_empty_group():
    qualities = {"iqa": dict(a=0.0, b=3.0), "text": dict(a=1.0, b=0.0)}
    found = group_advantages([("a", "b")], qualities, {"iqa": 1.0, "text": 1.0}, veto=True)
    assert found.groups == () and found.values == {} and found.counts.disagreeing == 2


def test_every_sample_is_counted_exactly_once():
    names = tuple("abcdefghij")
    qualities = {
        "iqa": dict(zip(names, [1.0, 3.5, math.nan, 4.0, 1.0, 1.0, math.nan, 0.0, 0.0, 0.0], strict=True)),
        "text": dict(zip(names, [-4.0, 5.0, 3.0, -3.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0], strict=True)),
    }
    groups = [names[:4], names[4:6], names[6:8], names[8:]]
    # c is both constant and broken: it counts as constant. On d alone the evaluators disagree.
    counts = group_advantages(groups, qualities, {"iqa": 1.0, "text": 0.1}, veto=True, constant={"c"}).counts
    assert counts == AdvantageCounts(
        samples=10, constant=1, non_finite=1, in_dropped_groups=5, disagreeing=1, kept=2, groups=4,
        small_groups=1, flat_groups=2,
    )  # fmt: skip
    total = counts.kept + counts.constant + counts.non_finite + counts.in_dropped_groups + counts.disagreeing
    assert total == counts.samples


def test_the_counts_cannot_be_changed_afterwards():
    found = group_advantages([GROUP], one_evaluator(1.0, 2.0, 3.0, 4.0), {"iqa": 1.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.counts.kept = 0  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flat_colours_are_constant_and_images_are_not(dtype: torch.dtype):
    rows = torch.arange(16.0).reshape(1, 16, 1).expand(3, 16, 16)
    flat = torch.tensor([200.0, 30.0, 90.0]).reshape(3, 1, 1).expand(3, 16, 16)
    flicker = flat + torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)).round()
    one_channel = torch.cat([flat[:2], rows[:1]])
    images = torch.stack([flat, flicker, rows, one_channel])
    images = images.to(torch.uint8) if dtype == torch.uint8 else images / 255
    assert constant_images(images).tolist() == [True, True, False, False]


def test_an_image_that_is_not_finite_has_no_content():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    image[0, 1, 2, 3] = math.nan
    assert constant_images(image).tolist() == [True]
