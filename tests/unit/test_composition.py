"""Several rewards become one quality with its exact gradient, and there is no gain beyond a hinge."""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from acpo_dist.core.errors import RewardConfigError
from acpo_dist.core.types import Normaliser, RewardTerm
from acpo_dist.data.images import real_images
from acpo_dist.data.toy.world import templates
from acpo_dist.objective.advantage import group_advantages
from acpo_dist.objective.composition import compose, composition_slopes
from acpo_dist.objective.pairs import pair_group
from acpo_dist.rewards.metrics import StridedJudgeMetric, TwoStreamMetric
from acpo_dist.rewards.statistics import Sharpness
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive
from acpo_dist.workers.learner.signal import PooledReward
from acpo_dist.workers.reward.wire import WireTensor
from acpo_dist.workers.reward.worker import RewardWorker, ScoredGradient
from tests.helpers.runs import copy_run

METRICS = (TwoStreamMetric, StridedJudgeMetric, Sharpness)
NORMALISERS = (
    Normaliser(mean=0.5, std=0.2, sign=1),
    Normaliser(mean=0.6, std=0.1, sign=1, ceiling=0.3),
    Normaliser(mean=0.02, std=0.05, sign=-1),
)
WEIGHTS = (1.0, 0.5, 2.0)


def images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    clean = templates()[torch.randperm(864, generator=generator)[:count]]
    return (clean + 0.1 * torch.randn(clean.shape, generator=generator)).clamp(0.01, 0.99)


class Workers:
    """Every metric in this process, with the image cut."""

    def __init__(self) -> None:
        self.by_name = {
            kind.Config().name: RewardWorker(kind.Config(), model=None, cut="image", wire_dtype="float32")
            for kind in METRICS
        }

    def submit(self, metric: str, sent: WireTensor, prompts: Sequence[str]) -> Future[ScoredGradient]:
        future = Future()
        future.set_result(self.by_name[metric].value_and_grad(sent, prompts))
        return future


def terms() -> list[RewardTerm]:
    return [
        RewardTerm(name=kind.Config().name, weight=weight, normaliser=normaliser)
        for kind, weight, normaliser in zip(METRICS, WEIGHTS, NORMALISERS, strict=True)
    ]


def in_one_graph(images: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """MATH 1.5 in autograd's hands: qualities (B,) and gradient."""
    images = images.clone().requires_grad_(True)
    rows = []
    for kind, normaliser in zip(METRICS, NORMALISERS, strict=True):
        score = kind(kind.Config())(images, [""] * len(images))
        quality = normaliser.sign * (score - normaliser.mean) / normaliser.std
        rows.append(quality if normaliser.ceiling is None else quality.clamp(max=normaliser.ceiling))
    shares = torch.tensor(WEIGHTS)[:, None]
    qualities = torch.stack(rows)
    mean = (shares * qualities).sum(0) / shares.sum()
    variance = (shares * (qualities - mean).square()).sum(0) / shares.sum()
    total = shares.sum() * (mean - spread * variance.sqrt())
    # A reward far above the others would be pushed down: it gets slope 0 instead.
    (slopes,) = torch.autograd.grad(total.sum(), qualities, retain_graph=True)
    (gradient,) = torch.autograd.grad(qualities, images, slopes.clamp(min=0))
    return total.detach(), gradient


@pytest.mark.parametrize("spread", [0.0, 0.7, 1.5])
def test_quality_and_gradient_of_several_rewards_are_those_of_one_graph(spread: float):
    images_BCHW = images(6)
    signal = PooledReward(
        Workers(), terms(), lambda clean: clean, cut="image", wire_dtype="float32", spread=spread
    )(images_BCHW, [""] * len(images_BCHW))()  # fmt: skip
    quality, gradient = in_one_graph(images_BCHW, spread)
    torch.testing.assert_close(signal.quality_B, quality, rtol=1e-5, atol=1e-5)
    error = (signal.gradient - gradient).flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
    assert float(error.max()) < 1e-5
    judged = Workers().by_name["strided_judge"].score((images_BCHW * 255).to(torch.uint8), [""] * len(images_BCHW))
    assert any(NORMALISERS[1].normalise(score) > 0.3 for score in judged), "no image reaches the hinge: a weak test"


class Together(Workers):
    """Responds only when all metrics have been requested."""

    def __init__(self) -> None:
        super().__init__()
        self.all_asked = threading.Barrier(len(METRICS), timeout=300)
        self._threads = ThreadPoolExecutor(len(METRICS))

    def submit(self, metric: str, sent: WireTensor, prompts: Sequence[str]) -> Future[ScoredGradient]:
        def compute() -> ScoredGradient:
            self.all_asked.wait()
            return super(Together, self).submit(metric, sent, prompts).result()

        return self._threads.submit(compute)


def test_remote_metrics_are_requested_in_parallel_with_the_same_result():
    images_BCHW = images(4)
    signals = [
        PooledReward(source, terms(), lambda clean: clean, cut="image", wire_dtype="float32", spread=0.7)(
            images_BCHW, [""] * 4
        )()
        for source in (Workers(), Together())
    ]
    assert torch.equal(signals[0].quality_B, signals[1].quality_B)
    assert torch.equal(signals[0].gradient, signals[1].gradient)


@pytest.mark.parametrize("cut", ["image", "latent"])
def test_a_window_of_x0_hat_alone_is_scored_and_has_a_gradient(cut: str):
    images = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(3))
    arguments = {"cut": cut, "wire_dtype": "float32", "crop": 32}
    reward, again = (PooledReward(Workers(), terms(), lambda clean: clean, seed=5, **arguments) for _ in range(2))
    corners = set()
    for _ in range(24):
        signal = reward(images, ["", ""])()
        rows, columns = (signal.gradient.abs().sum((0, 1)).sum(axis).nonzero().flatten() for axis in (1, 0))
        top, left = int(rows[0]), int(columns[0])
        assert (int(rows[-1]), int(columns[-1])) == (top + 31, left + 31)
        quality, gradient = in_one_graph(images[..., top : top + 32, left : left + 32], 0.0)
        torch.testing.assert_close(signal.quality_B, quality, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            signal.gradient[..., top : top + 32, left : left + 32], gradient, rtol=1e-4, atol=1e-6
        )
        corners.add((top, left))
        assert torch.equal(again(images, ["", ""])().gradient, signal.gradient)
    assert len({top for top, _ in corners}) > 8 and len({left for _, left in corners}) > 5


def test_a_window_larger_than_x0_hat_is_refused():
    reward = PooledReward(Workers(), terms(), lambda clean: clean, cut="image", wire_dtype="float32", crop=64)
    with pytest.raises(RewardConfigError, match=r"latent_crop is 64, and x0-hat has 32 x 32"):
        reward(images(1), [""])


def test_at_the_ceiling_a_single_reward_has_no_gradient_and_its_quality_is_the_ceiling():
    capped = RewardTerm(
        name="two_stream", weight=2.0, normaliser=Normaliser(mean=0.5, std=0.2, sign=1, ceiling=-99.0, target=-99.0)
    )
    signal = PooledReward(Workers(), [capped], lambda clean: clean, cut="image", wire_dtype="float32")(
        images(2), ["", ""]
    )()
    assert signal.quality_B.tolist() == [-198.0, -198.0] and signal.target == -198.0
    assert not signal.gradient.any()


def test_two_equal_rewards_at_one_standard_deviation_are_worth_the_lesser():
    assert compose([0.5, 3.0], [1.0, 1.0], 1.0) == pytest.approx(2 * 0.5)
    slopes = composition_slopes(torch.tensor([[0.5], [3.0]], dtype=torch.float64), [1.0, 1.0], 1.0)
    assert slopes[:, 0].tolist() == pytest.approx([2.0, 0.0])


def test_rewards_that_agree_have_the_slope_of_the_sum():
    slopes = composition_slopes(torch.tensor([[1.0], [1.0]]), [1.0, 3.0], 1.0)
    assert slopes[:, 0].tolist() == [1.0, 3.0]


def test_algorithms_that_see_scores_rank_by_the_pessimistic_composition():
    qualities = {"iqa": {"a": 3.0, "b": 1.0}, "text": {"a": -1.2, "b": 0.5}}
    weights = {"iqa": 0.5, "text": 0.5}
    plain = group_advantages([("a", "b")], qualities, weights, veto=False).values
    wary = group_advantages([("a", "b")], qualities, weights, veto=False, spread=1.0).values
    assert plain["a"] > plain["b"] and wary["b"] > wary["a"]
    (pair,) = pair_group(("a", "b"), qualities, weights, absolute=False, spread=1.0)
    assert (pair.winner, pair.margin) == ("b", pytest.approx(0.5 + 1.2))


def test_a_reward_where_lower_is_better_is_hinged_on_the_good_side():
    normaliser = Normaliser(mean=10.0, std=2.0, sign=-1, ceiling=1.0)
    assert [normaliser.reward(score) for score in (12.0, 9.0, 4.0)] == [-1.0, 0.5, 1.0]
    assert [normaliser.slope(score) for score in (12.0, 9.0, 4.0)] == [-0.5, -0.5, 0.0]


# Through a run


def two_rewards(*overrides: str) -> list[str]:
    return [
        "rewards.train=[{type: two_stream}, {type: sharpness, weight: 3}]", "rewards.judges=[{type: strided_judge}]",
        *overrides,
    ]  # fmt: skip


def test_the_weights_of_a_mean_are_shares_and_those_of_a_sum_are_as_configured(tiny):
    assert tiny(*two_rewards()).rewards.term_weights() == {"two_stream": 1.0, "sharpness": 3.0}
    mean = tiny(*two_rewards("rewards.combine=mean")).rewards
    assert (mean.term_weights(), mean.spread) == ({"two_stream": 0.25, "sharpness": 0.75}, 0.0)
    assert tiny(*two_rewards("rewards.combine=pessimistic", "rewards.spread_weight=0.4")).rewards.spread == 0.4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rewards.combine=pessimistic"], "one reward has no spread"),
        (["rewards.train=[{type: two_stream, hinge: nowhere/at/all}]"], "no such file or folder"),
        (["rewards.judges=[{type: strided_judge, hinge: 1.0}]"], "a judge is never optimised"),
    ],
)
def test_a_composition_that_makes_no_sense_is_refused(tiny, overrides, words):
    with pytest.raises(RewardConfigError, match=words):
        tiny(*overrides)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    for index, image in enumerate((templates()[:6] * 255).to(torch.uint8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((48, 48)).save(folder / f"{index}.png")
    return folder


def test_a_hinge_from_real_images_is_saved_and_used_after_a_resume(tiny, real, tmp_path, capsys):
    def config(name: str):
        return tiny(
            f"run.dir={tmp_path / name}", "run.iterations=2", "checkpoint.every=1",
            f"rewards.train=[{{type: two_stream, hinge: {real}}}, {{type: sharpness, hinge: 2.5}}]",
            "rewards.combine=pessimistic",
        )  # fmt: skip

    drive(config("whole"), open_ports, Console())
    said = capsys.readouterr().err
    assert "hinge of two_stream" in said and "6 real images" in said and "hinge of sharpness: +2.500" in said
    kept = json.loads((tmp_path / "whole/checkpoints/000002/state.json").read_text())["normalisers"]
    shown = torch.stack(real_images(real, size=32))
    scores = RewardWorker(TwoStreamMetric.Config(), model=None, cut="image", wire_dtype="float32").score(
        shown, [""] * len(shown)
    )
    fitted = kept["two_stream"]
    wanted = sum((score - fitted["mean"]) / fitted["std"] for score in scores) / len(scores)
    assert fitted["ceiling"] == fitted["target"] == pytest.approx(wanted, rel=1e-6)
    assert kept["sharpness"]["ceiling"] == 2.5 and kept["strided_judge"]["ceiling"] is None

    row = read_metrics(tmp_path / "whole/metrics.jsonl")[0]
    assert 0 <= row["reward/two_stream/at_hinge"] <= 1
    # A pessimistic mean of equal weights lies below the mean of the rewards, hinged ones below their gains.
    assert row["reward/combined/mean"] < (row["reward/two_stream/gain"] + row["reward/sharpness/gain"]) / 2

    copy_run(tmp_path / "whole", tmp_path / "parts", newest=1)
    drive(config("parts"), open_ports, Console(quiet=True), resume="auto")
    again = json.loads((tmp_path / "parts/checkpoints/000002/state.json").read_text())
    assert again["normalisers"] == kept
    weights = [
        load_file(tmp_path / name / "checkpoints/000002/learner/policy.safetensors") for name in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
