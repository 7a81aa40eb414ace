"""IPCE follows its formula, and a tiny CLIP of the toy world ranks true captions above wrong ones."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from acpo_dist.data.toy.world import caption_index, captions, templates
from acpo_dist.rewards.clip_backbone import OPENAI_MEAN, OPENAI_STD
from acpo_dist.rewards.clip_metrics import ClipScore
from acpo_dist.rewards.ipce import Ipce, ipce_quality, ipce_views, level_texts, patch_corners
from acpo_dist.rewards.training.tiny_clip import (
    TinyClipReport,
    new_tiny_clip,
    save_tiny_clip,
    shared_words,
    split_scenes,
    train_tiny_clip,
)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("untrained")
    save_tiny_clip(path, new_tiny_clip())
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyClipReport]:
    path = tmp_path_factory.mktemp("trained")
    return path, train_tiny_clip(path, steps=130, ipce_steps=80, seed=0)


# The formula


def by_the_book(folder: Path, image: Tensor, prompt: str, corners: list[tuple[int, int]], side: int) -> float:
    """One image, one view, one text at a time, in float64, from the formulas."""
    model = CLIPModel.from_pretrained(folder).double().eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    size = model.config.vision_config.image_size
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (OPENAI_MEAN, OPENAI_STD))

    def interpolated(length: int) -> Tensor:
        return torch.nn.functional.interpolate(
            image[None].double(), (length, length), mode="bilinear", antialias=True, align_corners=False
        )

    def logits(view: Tensor) -> list[float]:
        values = []
        for level in ("badly", "poorly", "fairly", "well", "perfectly"):
            tokens = tokenizer(f"a photo that {level} matches '{prompt}'", return_tensors="pt")
            values.append(model(pixel_values=(view - mean) / std, **tokens).logits_per_image.item())
        return values

    def softmax(values: list[float]) -> list[float]:
        powers = [math.exp(value - max(values)) for value in values]
        return [power / sum(powers) for power in powers]

    with torch.no_grad():
        large = interpolated(side)
        patches = [logits(large[..., top : top + size, left : left + size]) for top, left in corners]
        local = softmax([sum(column) / len(column) for column in zip(*patches, strict=True)])
        whole = softmax(logits(interpolated(size)))
    share = [(one + other) / 2 for one, other in zip(local, whole, strict=True)]
    return 5 / 4 * (sum(level * part for level, part in enumerate(share, start=1)) - 1)


def test_the_score_is_that_of_the_formula(untrained: Path):
    images, prompts = templates()[[5, 400, 800]], captions()[3:6]
    metric = Ipce(Ipce.Config(weights=str(untrained), patches=6, seed=4))
    # 512 of 224 is 73 of 32; the grid's step is 32 of 224, 5 of 32.
    grid = [(top, left) for top in range(0, 42, 5) for left in range(0, 42, 5)]
    corners = [grid[index] for index in torch.randperm(81, generator=rng(4))[:6].tolist()]
    wanted = [by_the_book(untrained, image, text, corners, 73) for image, text in zip(images, prompts, strict=True)]
    assert metric(images, prompts).tolist() == pytest.approx(wanted, abs=1e-4)


def test_certain_levels_give_the_ends_of_the_scale():
    levels = torch.eye(5)[None]
    for level in range(5):
        views = levels[:, level : level + 1].expand(1, 4, 5)
        assert ipce_quality(views, levels, 1000.0).item() == pytest.approx(1.25 * level)


def test_local_and_whole_views_count_the_same_however_many_patches_there_are():
    levels = torch.eye(5)[None]
    views = torch.stack([*[levels[0, 0]] * 7, levels[0, 4]])[None]
    assert ipce_quality(views, levels, 1000.0).item() == pytest.approx(2.5)


def test_logits_of_patches_are_averaged_before_the_softmax():
    levels = torch.eye(5)[None]
    views = torch.stack([levels[0, 0], levels[0, 4], levels[0, 0]])[None]
    share = torch.tensor([10.0, 0, 0, 0, 10.0]).softmax(0)
    local = (share * torch.arange(1, 6)).sum()
    whole = (torch.tensor([20.0, 0, 0, 0, 0]).softmax(0) * torch.arange(1, 6)).sum()
    assert ipce_quality(views, levels, 20.0).item() == pytest.approx(1.25 * float((local + whole) / 2 - 1), abs=1e-5)


# Views


@pytest.mark.parametrize(
    ("height", "width", "size", "step"),
    [(512, 512, 224, 32), (512, 1024, 224, 48), (73, 73, 32, 5), (73, 147, 32, 7)],
)
def test_patches_lie_inside_on_a_grid_that_scales_with_the_model(height: int, width: int, size: int, step: int):
    corners = patch_corners(height, width, size=size, count=15, generator=rng(0))
    assert len(set(corners)) == 15
    assert all(top % step == 0 and left % step == 0 for top, left in corners)
    assert all(top + size <= height and left + size <= width for top, left in corners)


def test_even_patches_span_the_image_from_corner_to_corner():
    corners = patch_corners(512, 512, size=224, count=15, generator=None)
    assert corners[0] == (0, 0) and corners[-1] == (288, 288) and len(set(corners)) == 15
    assert patch_corners(512, 512, size=224, count=1, generator=None) == [(0, 0)]


def test_an_image_with_few_places_gives_fewer_patches():
    assert patch_corners(224, 256, size=224, count=8, generator=rng(0)) in ([(0, 0), (0, 32)], [(0, 32), (0, 0)])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 48), (100, 73), (200, 300)])
def test_views_have_the_models_size_and_the_whole_image_comes_last(height: int, width: int):
    images = torch.rand(2, 3, height, width, generator=rng(0))
    views = ipce_views(images, size=32, short_side=512, count=4, generator=rng(1))
    assert views.shape == (2, 5, 3, 32, 32)
    if (height, width) == (32, 32):
        assert torch.equal(views[:, -1], images)


def test_a_large_image_is_not_resampled_for_its_patches():
    images = torch.rand(1, 3, 80, 90, generator=rng(0))
    views = ipce_views(images, size=32, short_side=512, count=1, generator=None)
    assert torch.equal(views[:, 0], images[..., :32, :32])


def test_the_gradient_through_views_and_formula_is_exact():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 9, 10, generator=rng(0), dtype=torch.float64).requires_grad_(True)
    image_weights, levels = torch.randn(3 * 16, 6).double(), torch.randn(1, 5, 6).double()

    def score(values: Tensor) -> Tensor:
        views = ipce_views(values, size=4, short_side=560, count=3, generator=rng(2))
        vectors = torch.nn.functional.normalize(views.flatten(2) @ image_weights, dim=-1)
        return ipce_quality(vectors, torch.nn.functional.normalize(levels, dim=-1), 5.0)

    assert torch.autograd.gradcheck(score, (images,))


def test_the_same_call_sees_the_same_patches_and_another_seed_others(untrained: Path):
    image, prompt = templates()[[7]], captions()[:1]
    metric = Ipce(Ipce.Config(weights=str(untrained), seed=1))
    assert metric(image, prompt).item() == metric(image, prompt).item()
    assert metric(image, prompt).item() != Ipce(Ipce.Config(weights=str(untrained), seed=2))(image, prompt).item()


# The recipe


def test_a_level_text_with_its_caption_fits_the_context_and_ends_where_the_model_reads(untrained: Path):
    tokenizer = CLIPTokenizer.from_pretrained(untrained)
    longest = max((text for caption in captions() for text in level_texts(caption)), key=len)
    tokens = tokenizer(longest)["input_ids"]
    assert len(tokens) <= 16
    # The end token stands at the end only: quotes and unknown signs have tokens of their own.
    assert tokens.index(tokenizer.eos_token_id) == len(tokens) - 1
    assert tokenizer.eos_token_id not in tokenizer("caf\u00e9 \u2603 7%")["input_ids"][:-1]


def test_held_out_scenes_are_never_trained_on():
    train, held_out = split_scenes(0)
    assert sorted([*train.flatten().tolist(), *held_out.flatten().tolist()]) == list(range(864))
    own = torch.arange(48)[:, None]
    assert bool((caption_index()[train] == own).all()) and bool((caption_index()[held_out] == own).all())


def test_shared_words_are_counted_as_in_the_captions():
    words = [caption.split() for caption in captions()]
    for one, other in ((0, 0), (0, 1), (3, 40), (10, 23)):
        same = sum(words[one][place] == words[other][place] for place in (1, 2, 5))
        assert int(shared_words()[one, other]) == same


def test_a_tiny_clip_ranks_true_captions_above_wrong_ones_on_held_out_scenes(trained: tuple[Path, TinyClipReport]):
    _ranks_true_captions_higher(*trained, least=0.8)


@pytest.mark.slow
def test_a_longer_training_ranks_nine_in_ten_captions_right(tmp_path: Path):
    _ranks_true_captions_higher(tmp_path, train_tiny_clip(tmp_path, steps=400, ipce_steps=250, seed=0), least=0.9)


def _ranks_true_captions_higher(path: Path, report: TinyClipReport, *, least: float) -> None:
    assert report.ipce_pairs >= least and report.clip_pairs >= least
    # The metric itself, loaded from the folder, on every held-out scene against one wrong caption each.
    scenes = split_scenes(0)[1]
    images = templates()[scenes.flatten()]
    own = torch.arange(48).repeat_interleave(scenes.shape[1])
    wrong = (own + torch.randint(1, 48, own.shape, generator=rng(9))) % 48
    for metric in (Ipce(Ipce.Config(weights=str(path))), ClipScore(ClipScore.Config(weights=str(path), prefix=""))):
        with torch.no_grad():
            true, false = (metric(images, [captions()[index] for index in ids]) for ids in (own, wrong))
        assert float((true > false).float().mean()) >= least


def test_climbing_the_gradient_of_the_trained_ipce_raises_the_score(trained: tuple[Path, TinyClipReport]):
    metric = Ipce(Ipce.Config(weights=str(trained[0])))
    image = templates()[[10]].clone().requires_grad_(True)
    prompt = [captions()[30]]
    score = metric(image, prompt)
    (gradient,) = torch.autograd.grad(score.sum(), image)
    with torch.no_grad():
        better = metric((image + 0.02 * gradient.sign()).clamp(0, 1), prompt)
    assert better.item() > score.item()
