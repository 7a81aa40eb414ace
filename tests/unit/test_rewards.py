"""Reward workers: lossless transfer, exact gradients, and errors instead of invented scores."""

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

import acpo_dist.data.toy
from acpo_dist.config.plugins import MetricConfig
from acpo_dist.core.errors import RewardConfigError, RewardError
from acpo_dist.data.toy.world import templates
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.models.training.toy_models import new_vae
from acpo_dist.rewards.metrics import StridedJudgeMetric, TwoStreamMetric
from acpo_dist.workers.reward.wire import pack, unpack
from acpo_dist.workers.reward.worker import CHUNK, NonFiniteScoreError, RewardWorker

TOY_SDXL = SdxlFamily.Config(path="toy-sdxl")
our_metrics = pytest.mark.parametrize(
    "metric", [TwoStreamMetric.Config(), StridedJudgeMetric.Config()], ids=lambda entry: entry.name
)
needs_pyiqa = pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="needs pyiqa (optional extra)")


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest over samples of the error's norm over the wanted norm."""
    return float(((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).max())


def clip_by_definition(pixels: Tensor) -> Tensor:
    """MATH's clamp for a score to be raised: its gradient passes unless the ascent step would leave [0, 1] further."""
    clipped = pixels + (pixels.clamp(0, 1) - pixels).detach()
    clipped.register_hook(lambda g: g.masked_fill(((pixels > 1) & (g > 0)) | ((pixels < 0) & (g < 0)), 0.0))
    return clipped


# Metrics so simple that their scores and gradients are known.


class Brightness:
    """Mean of all pixels."""

    class Config(MetricConfig):
        type: str = f"{__name__}:Brightness"

    def __init__(self, config: MetricConfig, *, device: str = "cpu") -> None:
        self.device = device

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


class Glare(Brightness):
    """Brightness, lower is better."""

    class Config(MetricConfig):
        type: str = f"{__name__}:Glare"
        direction: ClassVar[int] = -1


class Root(Brightness):
    """Its slope at a black image is infinite, its score is finite."""

    class Config(MetricConfig):
        type: str = f"{__name__}:Root"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3)).sqrt()


class Share(Brightness):
    """Share of red in all light, undefined for a black image."""

    class Config(MetricConfig):
        type: str = f"{__name__}:Share"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, 0].sum((1, 2)) / images.sum((1, 2, 3))


class PromptLength(Brightness):
    """Reads only the prompts."""

    class Config(MetricConfig):
        type: str = f"{__name__}:PromptLength"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(images) == len(prompts)
        return torch.tensor([float(len(prompt)) for prompt in prompts])


def worker(metric: MetricConfig | None = None, *, cut: str = "image", wire_dtype: str = "float32") -> RewardWorker:
    model = TOY_SDXL if cut == "latent" else None
    return RewardWorker(metric or TwoStreamMetric.Config(), model=model, cut=cut, wire_dtype=wire_dtype)


def images(count: int) -> Tensor:
    """uint8 images of the toy world under noise."""
    clean = templates()[torch.randperm(864, generator=rng(0))[:count]]
    return ((clean + 0.1 * torch.randn(clean.shape, generator=rng(1))).clamp(0, 1) * 255).to(torch.uint8)


# The worker's gradient


def two_stream_graph(decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Scores and gradients in one graph, without wire or worker."""
    metric = TwoStreamMetric(TwoStreamMetric.Config())

    def graph(values: Tensor) -> tuple[Tensor, Tensor]:
        values = values.clone().requires_grad_(True)
        pixels = decode(values)
        # The clamp must have something to do.
        assert 0.02 < float(((pixels < 0) | (pixels > 1)).float().mean()) < 0.98
        scores = metric(clip_by_definition(pixels), [""] * len(values))
        return scores.detach(), torch.autograd.grad(scores.sum(), values)[0]

    return graph


@pytest.fixture(scope="module")
def wide_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with only an untrained VAE whose images exceed [0, 1] on both sides."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    vae = new_vae()
    vae.decoder.conv_out.weight.data.mul_(4)
    vae.register_to_config(scaling_factor=0.8)
    vae.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    return folder


# float32: the same sums in another order. float16: 11 significant bits on the way back, at the values that arrived.
@pytest.mark.parametrize(("wire_dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3)])
def test_the_image_cut_gives_the_gradient_of_the_whole_graph(wire_dtype: str, tolerance: float):
    sent = pack(1.6 * torch.rand(5, 3, 32, 32, generator=rng(0)) - 0.3, wire_dtype)
    answer = worker(cut="image", wire_dtype=wire_dtype).value_and_grad(sent, [""] * 5)
    scores, gradient = two_stream_graph(lambda pixels: pixels)(unpack(sent))
    assert answer.scores == pytest.approx(scores.tolist(), abs=1e-5)
    assert relative_error(unpack(answer.gradient), gradient) < tolerance


@pytest.mark.parametrize(("wire_dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3)])
def test_the_latent_cut_gives_the_gradient_through_the_decoder(wire_dtype: str, tolerance: float, wide_vae: Path):
    vae = AutoencoderKL.from_pretrained(wide_vae / "vae").requires_grad_(False).eval()
    sent = pack(torch.randn(5, 4, 8, 8, generator=rng(0)), wire_dtype)
    model = SdxlFamily.Config(path=str(wide_vae))
    served = RewardWorker(TwoStreamMetric.Config(), model=model, cut="latent", wire_dtype=wire_dtype)
    answer = served.value_and_grad(sent, [""] * 5)

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5

    scores, gradient = two_stream_graph(decode)(unpack(sent))
    assert answer.scores == pytest.approx(scores.tolist(), abs=1e-5)
    assert relative_error(unpack(answer.gradient), gradient) < tolerance


def test_where_lower_is_better_the_clamp_knows_that_the_score_will_be_lowered():
    pixels = torch.tensor([-0.5, 0.5, 1.5]).reshape(3, 1, 1, 1).expand(3, 3, 32, 32)
    slope = 1 / (3 * 32 * 32)
    for metric, passed in ((Brightness.Config(), [1, 1, 0]), (Glare.Config(), [0, 1, 1])):
        answer = worker(metric).value_and_grad(pack(pixels, "float32"), [""] * 3)
        # Brightening may still reach the dark image, darkening the bright one; never the other way round.
        assert unpack(answer.gradient)[:, 0, 0, 0].tolist() == pytest.approx([slope * entry for entry in passed])


def test_a_worker_without_a_decoder_takes_no_latents():
    lame = RewardWorker(Brightness.Config(), model=None, cut="latent", wire_dtype="float32")
    with pytest.raises(RewardError, match="without a decoder"):
        lame.value_and_grad(pack(torch.zeros(1, 4, 8, 8), "float32"), [""])


@pytest.mark.parametrize(
    ("cut", "shape", "text"),
    [
        ("latent", (1, 3, 16, 16), r"x0-hat of shape \(B, 4, H, W\) \(rewards.cut=latent\), found \(1, 3, 16, 16\)"),
        ("image", (1, 4, 16, 16), r"pixels of shape \(B, 3, H, W\) \(rewards.cut=image\), found \(1, 4, 16, 16\)"),
        ("image", (3, 16, 16), r"found \(3, 16, 16\)"),
    ],
)
def test_a_gradient_at_something_of_another_shape_is_refused_with_the_shape_that_is_wanted(cut, shape, text):
    with pytest.raises(RewardError, match=text):
        worker(cut=cut).value_and_grad(pack(torch.zeros(shape), "float16"), [""] * shape[0])


# Scores depend on their own image alone


def test_images_reach_the_metric_scaled_to_one():
    images = torch.stack([torch.full((3, 32, 32), value, dtype=torch.uint8) for value in (0, 51, 255)])
    assert worker(Brightness.Config()).score(images, [""] * 3) == pytest.approx([0.0, 0.2, 1.0], abs=1e-6)


@our_metrics
def test_a_score_does_not_depend_on_the_other_images_of_the_batch(metric: MetricConfig):
    images_BCHW, served = images(CHUNK + 5), worker(metric)
    together = served.score(images_BCHW, [""] * len(images_BCHW))
    backwards = served.score(images_BCHW.flip(0), [""] * len(images_BCHW))[::-1]
    alone = [served.score(images_BCHW[i : i + 1], [""])[0] for i in range(0, len(images_BCHW), 5)]
    assert max(together) - min(together) > 0.01
    # float32 convolutions may sum in another order for another batch size.
    assert together == pytest.approx(backwards, abs=2e-6)
    assert together[::5] == pytest.approx(alone, abs=2e-6)


def test_a_gradient_does_not_depend_on_the_other_images_of_the_batch():
    served, values = worker(cut="latent"), torch.randn(6, 4, 8, 8, generator=rng(0))
    together = unpack(served.value_and_grad(pack(values, "float32"), [""] * 6).gradient)
    alone = [unpack(served.value_and_grad(pack(value[None], "float32"), [""]).gradient) for value in values]
    assert relative_error(torch.cat(alone), together) < 1e-5


def test_prompts_stay_with_their_images_across_chunks():
    prompts = ["x" * length for length in range(2 * CHUNK + 3)]
    images = torch.zeros(len(prompts), 3, 32, 32, dtype=torch.uint8)
    assert worker(PromptLength.Config()).score(images, prompts) == [float(len(prompt)) for prompt in prompts]


# What is not a number is an error


@our_metrics
@pytest.mark.parametrize("cut", ["image", "latent"])
@pytest.mark.parametrize("wire_dtype", ["float16", "float32"])
def test_one_nan_among_the_sent_values_is_an_error(metric: MetricConfig, cut: str, wire_dtype: str):
    values = torch.rand((3, 4, 8, 8) if cut == "latent" else (3, 3, 32, 32), generator=rng(0))
    values[1, 2, 3, 4] = math.nan
    with pytest.raises(RewardError, match=f"{metric.name}.*not finite"):
        worker(metric, cut=cut, wire_dtype=wire_dtype).value_and_grad(pack(values, wire_dtype), [""] * 3)


def test_a_score_of_a_finished_image_that_is_not_finite_is_an_error_that_counts_them():
    images = torch.full((3, 3, 32, 32), 90, dtype=torch.uint8)
    images[2] = 0
    with pytest.raises(NonFiniteScoreError, match="1 of 3 scores are not finite"):
        worker(Share.Config()).score(images, [""] * 3)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.rand(2, 3, 32, 32), r"torch\.float32 of shape \(2, 3, 32, 32\)"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), r"torch\.uint8 of shape \(2, 1, 32, 32\)"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"torch\.uint8 of shape \(3, 32, 32\)"),
    ],
)
def test_finished_images_of_another_type_or_shape_are_refused_and_left_as_they_are(images: Tensor, found: str):
    before = images.clone()
    with pytest.raises(RewardError, match=f"`two_stream` scores uint8 RGB images.*{found}"):
        worker().score(images, [""] * len(images))
    assert torch.equal(images, before)


@our_metrics
def test_images_too_small_for_a_metric_of_ours_are_refused_with_both_sizes(metric: MetricConfig):
    least = {"two_stream": 32, "strided_judge": 16}[metric.type]
    small = torch.full((1, 3, least, least - 1), 90, dtype=torch.uint8)
    with pytest.raises(RewardError, match=rf"`{metric.name}` needs images of at least {least} x {least}, found"):
        worker(metric).score(small, [""])


def test_an_infinite_gradient_of_a_finite_score_is_an_error():
    with pytest.raises(RewardError, match="gradient is not finite"):
        worker(Root.Config()).value_and_grad(pack(torch.zeros(1, 3, 32, 32), "float16"), [""])


# Weights


def test_weights_that_are_not_there_are_named(tmp_path: Path):
    config = TwoStreamMetric.Config(weights=str(tmp_path / "absent.safetensors"))
    with pytest.raises(RewardConfigError, match=r"absent\.safetensors"):
        TwoStreamMetric(config)


def test_a_file_that_holds_other_weights_is_refused(tmp_path: Path):
    (tmp_path / "garbage.safetensors").write_bytes(b"not weights")
    other = Path(acpo_dist.data.toy.__file__).parent / "assets" / "judge.safetensors"
    for path in (tmp_path / "garbage.safetensors", other):
        with pytest.raises(RewardConfigError, match="does not hold weights for `two_stream`"):
            TwoStreamMetric(TwoStreamMetric.Config(weights=str(path)))
