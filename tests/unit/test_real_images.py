"""Captioned real images for latent models: buckets, cached latents, and the data terms of the objective."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import ConfigError, DataError
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.data.decoding import fit
from acpo_dist.tracking.console import Console
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive
from acpo_dist.workers.learner.real_images import RealImages, is_held_out
from tests.helpers.captioned import write_captioned
from tests.helpers.config import refusal
from tests.helpers.runs import results

BUCKETS = "model.image_size=[[32, 32], [32, 48], [48, 32]]"
SHAPES = ((32, 32), (60, 90), (96, 64), (40, 44))
"""Of the images: the second and third are nearest to 2:3 and 3:2, the others to a square."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_captioned(tmp_path_factory.mktemp("images"), 12, shapes=SHAPES)


def config_for(path: Path, *overrides: str):
    return load_config("toy_sdxl", [BUCKETS, f"data.path={path}", "algorithm.anchor.source=data", *overrides])


@pytest.fixture(scope="module")
def family(folder: Path):
    return resolve("model", MODELS, "sdxl").load(config_for(folder).model, device="cpu", trainable=False)


def test_images_are_cropped_to_the_nearest_size_encoded_once_and_carry_their_own_size_and_crop(
    folder: Path, family, tmp_path: Path, monkeypatch
):
    data = config_for(folder, "data.flip=true").data
    images = RealImages(data, family, tmp_path)
    assert Counter(image.size for image in images.images) == {(32, 32): 6, (32, 48): 3, (48, 32): 3}
    for batch in images.in_order(4):
        assert len({image.shape for image in batch.clean}) == 1
    wide = next(image for image in images.images if image.original == (96, 64))
    near = next(image for image in images.images if image.original == (40, 44))
    assert wide.crop == (0, 0) and near.crop == (2, 0) and near.size == (32, 32)
    assert wide.caption == (folder / wide.key).with_suffix(".txt").read_text()
    ids = family.size_conditioning([near.original], [near.crop], near.size)["time_ids"]
    assert ids.tolist() == [[44, 40, 2, 0, 32, 32]]
    pixels = torch.from_numpy(np.ascontiguousarray(fit(Image.open(folder / near.key), near.size))).float()[None] / 255
    number = [image.key for image in images.images if image.size == near.size].index(near.key)
    for flipped in (0, 1):
        found = images.batch([_key(images, near.size, number) | flipped << 31])
        wanted = family.encode_images(pixels.flip(-1) if flipped else pixels)
        torch.testing.assert_close(found.clean, wanted, rtol=0, atol=1e-5)

    def encoded(_):
        raise AssertionError("the cache is not used")

    monkeypatch.setattr(family, "encode_images", encoded)
    assert RealImages(data, family, tmp_path).images == images.images


def _key(images: RealImages, size: tuple[int, int], number: int) -> int:
    """A key that selects the image with this number within a size."""
    same = [image for image in images.images if image.size == size]
    for key in range(10000):
        if images.images[key % len(images)].size == size and key % len(same) == number:
            return key
    raise AssertionError("no key")


def test_an_interrupted_cache_is_completed(folder: Path, family, tmp_path: Path):
    data = config_for(folder).data
    before = RealImages(data, family, tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    after = RealImages(data, family, tmp_path)
    assert after.images == before.images
    assert torch.equal(after.batch([1]).clean, before.batch([1]).clean)


def test_a_changed_caption_is_trained_though_the_file_keeps_its_length(family, tmp_path: Path):
    folder = write_captioned(tmp_path / "images", 2)
    caption = (folder / "0000.txt").read_text()
    other = ("x" if caption[0] != "x" else "y") + caption[1:]
    for text in (caption, other):
        (folder / "0000.txt").write_text(text)
        images = RealImages(config_for(folder).data, family, tmp_path / "cache")
        assert images.images[0].caption == text


def test_images_without_a_caption_or_that_cannot_be_read_are_counted_and_named(family, tmp_path: Path, caplog):
    folder = write_captioned(tmp_path / "images", 4)
    (folder / "0001.txt").unlink()
    (folder / "0002.png").write_bytes(b"damaged")
    images = RealImages(config_for(folder).data, family, tmp_path / "cache")
    assert [image.key for image in images.images] == ["0000.png", "0003.png"]
    assert "1 images are not used (no caption), such as 0001.png" in caplog.text
    assert "1 images are not used (not readable), such as 0002.png" in caplog.text


def test_held_out_images_do_not_train_and_the_two_parts_are_all(folder: Path, family, tmp_path: Path):
    data = config_for(folder, "data.held_out=0.4").data
    parts = [RealImages(data, family, tmp_path, held_out=held_out) for held_out in (False, True)]
    keys = [{image.key for image in part.images} for part in parts]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 12
    assert all(is_held_out(key, 0.4) for key in keys[1])
    with pytest.raises(DataError, match="held-out images"):
        RealImages(config_for(folder).data, family, tmp_path, held_out=True)


def test_every_image_is_as_likely_as_another(folder: Path, family, tmp_path: Path):
    images = RealImages(config_for(folder).data, family, tmp_path)
    generator = torch.Generator().manual_seed(0)
    counts: Counter = Counter()
    for _ in range(600):
        keys = torch.randint(2**40, (2,), generator=generator).tolist()
        counts.update(map(str, images.batch(keys).clean.sum((1, 2, 3)).tolist()))
    assert len(counts) == 12 and max(counts.values()) < 2 * min(counts.values())


def test_what_cannot_be_used_is_refused(tmp_path: Path, tiny):
    for key in ("data_weight", "data_reward_weight"):
        assert "algorithm.anchor.source=data" in refusal("toy_sdxl", f"algorithm.{key}=1")
    assert "data.flip" in refusal("cifar10_ddpm", "data.flip=true")
    folder = write_captioned(tmp_path / "images", 2)
    for file in folder.glob("*.txt"):
        file.unlink()
    config = tiny(f"data.path={folder}", "algorithm.anchor.source=data", f"run.dir={tmp_path / 'run'}")
    with pytest.raises(ConfigError, match=r"no caption.*data\.caption_column"):
        drive(config, open_ports, Console(quiet=True))


@pytest.mark.slow
def test_a_run_on_captioned_images_has_its_data_terms_resumes_exactly_and_is_evaluated_on_held_out_images(
    acpo, folder: Path, tiny, tmp_path: Path
):
    options = [
        BUCKETS, f"data.path={folder}", "data.held_out=0.4", "data.flip=true", "algorithm.anchor.source=data",
        "algorithm.data_weight=1", "algorithm.data_reward_weight=0.5", "checkpoint.every=1", "sampler.num_steps=3",
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    quiet = Console(quiet=True)
    drive(tiny(*options, "run.iterations=2", f"run.dir={whole}"), open_ports, quiet)
    drive(tiny(*options, "run.iterations=1", f"run.dir={parts}"), open_ports, quiet)
    drive(tiny(*options, "run.iterations=2", f"run.dir={parts}"), open_ports, quiet, resume="auto")
    rows = results(whole)
    assert rows == results(parts)
    assert {"data/denoising", "data/reward/quality", "anchor/uniform"} <= rows[0].keys()
    out = tmp_path / "eval"
    code, _, err = acpo(
        "eval", str(whole), "--suite", "toy", "--limit", "2", "--judges", "two_stream", "--drift",
        "0", "--features", "low-pass:4", "--out", str(out), "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((out / "evaluation.json").read_text())["denoising"]
    assert found["num_images"] == sum(is_held_out(f"{n:04d}.png", 0.4) for n in range(12))
    assert found["ratio"] == pytest.approx(found["model"] / found["base"]) and 0.5 < found["ratio"] < 2
