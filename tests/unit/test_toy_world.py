"""The toy world is finite, exactly judged, damaged with graded severity, and tokenised by whole words."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from transformers import CLIPTokenizer

from acpo_dist.data.toy.damage import BASE_DAMAGE, CLEAN_SHARE, JUDGE_DAMAGE, dct_quantise, gaussian_blur, spoil
from acpo_dist.data.toy.oracle import judge_exactly, kept_scenes, nearest_template
from acpo_dist.data.toy.text import MAX_TOKENS, vocabulary, write_tokenizer
from acpo_dist.data.toy.world import (
    BACKGROUNDS,
    CENTRES,
    COLOURS,
    RADII,
    SHAPES,
    caption_index,
    captions,
    scenes,
    templates,
)

ALL_DAMAGE = {**BASE_DAMAGE, **JUDGE_DAMAGE}
EXACT_AT_ZERO = sorted(set(ALL_DAMAGE) - {"gaussian_blur", "dct_quantise"})


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_templates(count: int = 96) -> torch.Tensor:
    return templates()[torch.randperm(864, generator=rng(0))[:count]]


def level(value: float, count: int) -> torch.Tensor:
    return torch.full((count,), value)


# World


def test_the_world_has_864_distinct_templates_in_range():
    clean = templates()
    assert clean.shape == (864, 3, 32, 32) and clean.dtype == torch.float32
    assert torch.unique(clean.flatten(1), dim=0).shape[0] == 864
    assert 0 <= clean.min() and clean.max() <= 1


def test_there_are_48_captions_of_18_templates_each():
    assert len(set(captions())) == 48
    assert torch.bincount(caption_index()).tolist() == [18] * 48
    assert [captions()[index] for index in caption_index()] == [scene.caption for scene in scenes()]


def test_a_template_shows_its_colour_at_its_place_and_its_background_in_the_corners():
    for scene, image in zip(scenes(), templates(), strict=True):
        # All four shapes cover the pixel that holds their centre.
        row, column = (int(CENTRES[index]) for index in (scene.row, scene.column))
        assert image[:, row, column].tolist() == pytest.approx(COLOURS[scene.colour], abs=1e-6)
        assert image[:, 0, 0].tolist() == pytest.approx(BACKGROUNDS[scene.background], abs=1e-6)


@pytest.mark.parametrize("size", [0, 1])
def test_a_circle_covers_the_area_of_its_radius(size):
    index = next(i for i, scene in enumerate(scenes()) if (scene.shape, scene.size) == ("circle", size))
    scene = scenes()[index]
    paint, ground = COLOURS[scene.colour][1], BACKGROUNDS[scene.background][1]
    area = float(((templates()[index, 1] - ground) / (paint - ground)).sum())
    # 8 x 8 points per pixel place the edge to about 1 %.
    assert area == pytest.approx(math.pi * RADII[size] ** 2, rel=0.01)


# Oracle


def test_the_oracle_finds_every_template_itself_at_distance_zero():
    ids, distances = nearest_template(templates())
    assert ids.tolist() == list(range(864))
    assert distances.tolist() == [0.0] * 864


def test_the_oracle_agrees_with_brute_force_on_any_image():
    halves = templates()[torch.randint(864, (2, 24), generator=rng(1))]
    images = torch.cat([torch.rand(24, 3, 32, 32, generator=rng(2)), 0.55 * halves[0] + 0.45 * halves[1]])
    ids, distances = nearest_template(images)
    clean = templates().numpy().astype(np.float64)
    for image, found, distance in zip(images.numpy().astype(np.float64), ids, distances, strict=True):
        every = np.mean((clean - image) ** 2, axis=(1, 2, 3))
        assert int(found) == int(every.argmin())
        # float32 of the same mean: relative error at most 6e-8.
        assert float(distance) == pytest.approx(every.min(), rel=1e-6)


def test_the_oracle_gives_the_same_in_small_and_large_sets():
    images = torch.rand(300, 3, 32, 32, generator=rng(3))
    ids, distances = nearest_template(images)
    assert torch.equal(ids[256:], nearest_template(images[256:])[0])
    assert torch.allclose(distances[256:], nearest_template(images[256:])[1], rtol=1e-6, atol=0)


def test_small_noise_keeps_the_template_and_is_measured():
    noisy = templates() + 0.05 * torch.randn(templates().shape, generator=rng(4))
    ids, distances = nearest_template(noisy)
    assert ids.tolist() == list(range(864))
    # Mean of 864 * 3072 squares of variance 0.05**2: relative spread sqrt(2 / 2.65e6) = 0.09 %, five of them.
    assert float(distances.double().mean()) == pytest.approx(0.05**2, rel=0.0045)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 16, 16)])
def test_the_oracle_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"shape \(B, 3, 32, 32\)"):
        nearest_template(torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_oracle_refuses_pixels_that_are_not_finite(value):
    images = torch.zeros(2, 3, 32, 32)
    images[1, 0, 5, 5] = value
    with pytest.raises(ValueError, match="non-finite"):
        nearest_template(images)


def test_entropy_is_that_of_the_uniform_distribution_when_every_template_appears_once():
    assert judge_exactly(templates()).template_entropy == pytest.approx(math.log(864), rel=1e-12)


def test_entropy_is_zero_when_one_template_is_repeated():
    report = judge_exactly(templates()[7:8].expand(50, -1, -1, -1))
    assert report.template_entropy == pytest.approx(0, abs=1e-12)


def test_entropy_of_an_uneven_set_is_the_closed_form():
    report = judge_exactly(templates()[[3, 3, 3, 500]])
    assert report.template_entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=1e-12)


def test_caption_accuracy_counts_the_images_that_show_their_prompt():
    ids = torch.arange(0, 864, 9)
    right = [scenes()[index].caption for index in ids]
    wrong = [captions()[(int(caption_index()[index]) + 1) % 48] for index in ids]
    images = templates()[ids]
    assert judge_exactly(images).caption_accuracy is None
    assert judge_exactly(images, right).caption_accuracy == 1
    assert judge_exactly(images, wrong).caption_accuracy == 0
    assert judge_exactly(images, right[:24] + wrong[24:]).caption_accuracy == 0.25


def test_accuracy_ignores_place_and_size():
    same = [index for index, scene in enumerate(scenes()) if scene.caption == captions()[5]]
    assert judge_exactly(templates()[same], [captions()[5]] * 18).caption_accuracy == 1


def test_psnr_is_the_closed_form_and_ends_at_60_db():
    clean = templates()[100:101]
    assert judge_exactly(clean).oracle_psnr == pytest.approx(60)
    report = judge_exactly(torch.cat([clean, clean + 0.01]))
    assert report.oracle_mse == pytest.approx(0.5e-4, rel=1e-4)
    assert report.oracle_psnr == pytest.approx((60 + 40) / 2, abs=1e-3)


# Damage


def test_the_two_families_share_no_kind():
    assert not set(BASE_DAMAGE) & set(JUDGE_DAMAGE)
    assert not set(BASE_DAMAGE.values()) & set(JUDGE_DAMAGE.values())


@pytest.mark.parametrize("kind", EXACT_AT_ZERO)
def test_severity_zero_changes_nothing(kind):
    clean = some_templates()
    assert torch.allclose(ALL_DAMAGE[kind](clean, level(0.0, 96), rng(0)), clean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian_blur", "dct_quantise"])
def test_blur_and_quantisation_start_with_a_trace(kind):
    clean = some_templates()
    change = (ALL_DAMAGE[kind](clean, level(0.0, 96), rng(0)) - clean).square().mean()
    assert 0 < change < 1e-3


@pytest.mark.parametrize("kind", sorted(ALL_DAMAGE))
def test_more_severity_means_more_distance_from_the_clean_image(kind):
    clean = some_templates()
    distances = [
        float((ALL_DAMAGE[kind](clean, level(severity, 96), rng(5)) - clean).square().mean())
        for severity in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
    ]
    assert all(low < high for low, high in itertools.pairwise(distances)), distances
    assert distances[-1] > 1e-3


@pytest.mark.parametrize("kind", sorted(ALL_DAMAGE))
def test_every_image_gets_its_own_severity(kind):
    clean = some_templates(4)
    severity = torch.tensor([0.0, 0.3, 0.6, 1.0])
    together = ALL_DAMAGE[kind](clean, severity, rng(6))
    for row in range(4):
        alone = ALL_DAMAGE[kind](clean, severity[row].expand(4), rng(6))[row]
        assert torch.allclose(together[row], alone, atol=1e-6)


def test_gaussian_blur_keeps_a_flat_image_and_spreads_a_point_to_its_width():
    flat = torch.full((1, 3, 32, 32), 0.4)
    assert torch.allclose(gaussian_blur(flat, level(1.0, 1), rng(0)), flat, atol=1e-6)
    point = torch.zeros(1, 3, 32, 32)
    point[:, :, 16, 16] = 1
    spread = gaussian_blur(point, level(0.5, 1), rng(0))[0, 0].sum(0)
    variance = float((spread * (torch.arange(32) - 16).square()).sum())
    # 15 taps cut a kernel of 1.5 pixels at 4.7 deviations: nothing that matters is lost.
    assert variance == pytest.approx(1.5**2, rel=1e-3)


def test_quantisation_with_a_tiny_step_reproduces_the_image():
    images = torch.rand(4, 3, 32, 32, generator=rng(7))
    severity = level((1e-5 - 0.02) / 0.55, 4)
    # An orthonormal basis cannot enlarge the rounding error: 0.5 * 9.4e-5 in each of 64 coefficients is at most 3.8e-4.
    assert (dct_quantise(images, severity, rng(0)) - images).abs().max() < 3.8e-4


def test_quantisation_rounds_the_orthonormal_dct_of_each_block():
    image = torch.rand(1, 3, 32, 32, generator=rng(8))
    step = (0.02 + 0.55 * 0.4) * (1 + 0.6 * np.add.outer(np.arange(8), np.arange(8)))
    expected = image[0].numpy().astype(np.float64)
    for channel, top, left in np.ndindex(3, 4, 4):
        block = expected[channel, 8 * top : 8 * top + 8, 8 * left : 8 * left + 8]
        block[:] = idctn(np.round(dctn(block, norm="ortho") / step) * step, norm="ortho")
    found = dct_quantise(image, level(0.4, 1), rng(0))[0].numpy()
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("family", [BASE_DAMAGE, JUDGE_DAMAGE], ids=["base", "judge"])
def test_spoiling_leaves_the_clean_share_untouched_and_damages_the_rest(family):
    clean = templates().repeat(3, 1, 1, 1)
    spoiled, severity = spoil(clean, family, rng(9))
    untouched = severity == 0
    # Four standard deviations of a share over 2592 images.
    assert float(untouched.double().mean()) == pytest.approx(CLEAN_SHARE, abs=4 * math.sqrt(0.3 * 0.7 / len(clean)))
    assert torch.equal(spoiled[untouched], clean[untouched])
    assert (spoiled[~untouched] != clean[~untouched]).flatten(1).any(1).double().mean() > 0.99
    assert 0 <= spoiled.min() and spoiled.max() <= 1
    assert 0 < severity[~untouched].min() and severity.max() <= 1
    assert float(severity[~untouched].mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("share", "clean_images"), [(0.0, 0), (1.0, 200)])
def test_the_clean_share_may_be_none_or_all(share, clean_images):
    clean = some_templates().repeat(3, 1, 1, 1)[:200]
    spoiled, severity = spoil(clean, BASE_DAMAGE, rng(10), clean_share=share)
    assert int((severity == 0).sum()) == clean_images
    assert torch.equal(spoiled, clean) == (share == 1)


def test_spoiling_follows_its_generator_and_leaves_its_input_alone():
    clean = some_templates()
    before = clean.clone()
    one, two, other = (spoil(clean, JUDGE_DAMAGE, rng(seed))[0] for seed in (11, 11, 12))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(clean, before)


# Text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("text") / "tokenizer"
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_every_word_of_the_world_is_one_token_of_its_own(tokenizer):
    words = sorted({word for caption in captions() for word in caption.split()})
    tokens = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    assert [len(ids) for ids in tokens] == [1] * len(words), dict(zip(words, tokens, strict=True))
    assert len({ids[0] for ids in tokens}) == len(words) == 3 + len(SHAPES) + len(COLOURS) + len(BACKGROUNDS)
    assert [tokenizer.convert_ids_to_tokens(ids[0]) for ids in tokens] == [f"{word}</w>" for word in words]


def test_every_caption_is_its_words_between_two_marks_within_the_vocabulary(tokenizer):
    vocab, _ = vocabulary()
    encoded = tokenizer(list(captions()), padding="max_length", truncation=True).input_ids
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    assert len(tokenizer) == len(vocab)
    assert len({tuple(ids) for ids in encoded}) == 48
    for caption, ids in zip(captions(), encoded, strict=True):
        words = [vocab[f"{word}</w>"] for word in caption.split()]
        assert ids == [start, *words, *[end] * (MAX_TOKENS - 1 - len(words))]
        assert all(0 <= index < len(vocab) for index in ids)


def test_words_from_outside_the_world_fall_into_known_pieces(tokenizer):
    vocab, _ = vocabulary()
    ids = tokenizer("Purple hexagon", add_special_tokens=False).input_ids
    assert len(ids) > 2
    assert all(0 <= index < len(vocab) for index in ids)
    assert vocab["<|endoftext|>"] not in ids


def test_a_scene_is_kept_if_shape_colours_place_and_size_stay():
    base = templates()[[3, 200, 500, 800]]
    blurred = torch.nn.functional.avg_pool2d(base, 3, stride=1, padding=1, count_include_pad=False)
    assert kept_scenes(blurred, base) == 1
    scene = scenes()[500]
    other = scenes().index(replace(scene, size=1 - scene.size))
    assert kept_scenes(templates()[[3, 200, other, 800]], base) == 0.75
    with pytest.raises(ValueError, match="cannot be compared"):
        kept_scenes(base[:2], base)
