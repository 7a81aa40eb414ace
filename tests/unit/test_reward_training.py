"""Rewards trained on custom images rank held-out ones, and load as rewards."""

import csv
import json
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from acpo_dist.core.errors import DataError
from acpo_dist.data.toy.damage import BASE_DAMAGE, JUDGE_DAMAGE, grain, spoil
from acpo_dist.data.toy.world import caption_index, captions, templates
from acpo_dist.rewards.ipce import Ipce
from acpo_dist.rewards.metrics import TwoStreamMetric
from acpo_dist.rewards.training.damaged import damaged_windows, native_images
from acpo_dist.rewards.training.labels import csv_rows, opinions, split_by_reference
from acpo_dist.rewards.training.quality import QualitySettings, train_two_stream
from acpo_dist.rewards.training.tiny_clip import new_tiny_clip, save_tiny_clip


def save(image: Tensor, path: Path | BytesIO) -> None:
    Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path, "PNG")


def scenes(count: int) -> list[int]:
    return torch.randperm(864, generator=torch.Generator().manual_seed(0))[:count].tolist()


def test_no_reference_is_on_both_sides_of_the_split():
    references = [f"r{row % 12}" for row in range(60)]
    train, held_out = split_by_reference(references, 0.25, seed=0)
    assert sorted([*train, *held_out]) == list(range(60))
    assert len({references[row] for row in held_out}) == 3
    assert not {references[row] for row in held_out} & {references[row] for row in train}
    assert (
        split_by_reference(references, 0.25, seed=0)[1] == held_out != split_by_reference(references, 0.25, seed=1)[1]
    )
    with pytest.raises(DataError, match="at least 10"):
        split_by_reference(references[:9], 0.25, seed=0)


def test_opinions_are_brought_to_one_scale_whichever_end_is_good(tmp_path):
    file = tmp_path / "mos.csv"
    file.write_text("path,mos\na.png,20\nb.png,60\nc.png,40\n")
    rows = csv_rows(file, ("path", "mos"))
    assert opinions(rows, file) == [0.0, 1.0, 0.5] and opinions(rows, file, lower_is_better=True) == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,score\na.png,3\n", "needs the columns `path` and `mos`"),
        ("path,mos\na.png,3\nb.png,bad\n", "line 3: expected a number"),
        ("path,mos\na.png,3\nb.png,3\n", "nothing can be ranked"),
        ("path,mos\n", "no row"),
        ("path,mos\na.png,3\nb.png,4\n", "no such file"),
    ],
)
def test_a_csv_file_that_cannot_be_learnt_from_is_refused(acpo, text, words, tmp_path):
    (tmp_path / "mos.csv").write_text(text)
    code, _, err = acpo("rewards", "train", "two_stream", str(tmp_path / "mos.csv"))
    assert code == 2 and words in err


def test_two_stream_learns_to_rank_opinions_and_loads_as_a_reward(acpo, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, row in enumerate(scenes(40)):
        for version in range(3):
            severity = torch.rand(1, generator=generator)
            spoiled = grain(templates()[row : row + 1], severity, generator)[0].clamp(0, 1)
            save(spoiled, tmp_path / f"{number}-{version}.png")
            rows.append((f"{number}-{version}.png", float(100 * severity), number))
    with (tmp_path / "dmos.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "mos", "reference"), *rows])
    weights = tmp_path / "out" / "iqa.safetensors"
    code, out, _ = acpo(
        "rewards",
        "train",
        "two_stream",
        str(tmp_path / "dmos.csv"),
        "--lower-is-better",
        "--steps",
        "60",
        "--batch-size",
        "32",
        "--learning-rate",
        "0.003",
        "--out",
        str(weights),
        "--json",
    )
    report = json.loads(out.splitlines()[-1])  # libraries may announce themselves before it
    assert code == 0 and (report["labels"], report["references"], report["held_out_references"]) == ("opinions", 32, 8)
    assert report["held_out_images"] == 24 and report["srcc"] > 0.7
    metric = TwoStreamMetric(TwoStreamMetric.Config(weights=str(weights)))
    fresh = templates()[scenes(90)[60:]]
    severity = torch.linspace(0, 1, len(fresh))
    scores = metric(grain(fresh, severity, generator).clamp(0, 1), [""] * len(fresh))
    assert spearmanr(scores.numpy(), -severity.numpy()).statistic > 0.6


def test_two_stream_training_repeats_itself_from_its_seed_on_images_of_several_sizes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(256, (3, 32 + 8 * (row % 3), 41), dtype=torch.uint8, generator=generator) for row in range(12)
    ]
    for name in ("one", "two"):
        train_two_stream(images, tmp_path / f"{name}.safetensors", QualitySettings(steps=2, batch_size=4))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    with pytest.raises(DataError, match="below 32 x 32"):
        train_two_stream([image[:, :30] for image in images], tmp_path / "no.safetensors", QualitySettings())


def captioned_parquet(path: Path, count: int) -> Path:
    encoded = []
    for row in scenes(count):
        buffer = BytesIO()
        save(templates()[row], buffer)
        encoded.append(buffer.getvalue())
    texts = [captions()[int(caption_index()[row])] for row in scenes(count)]
    pq.write_table(pa.table({"image": pa.array(encoded, pa.binary()), "prompt": texts}), path)
    return path


def test_ipce_trains_on_captioned_images_and_loads_as_a_reward(acpo, tmp_path):
    torch.manual_seed(0)
    save_tiny_clip(tmp_path / "clip", new_tiny_clip())
    data = captioned_parquet(tmp_path / "set.parquet", 40)
    code, out, _ = acpo(
        "rewards",
        "train",
        "ipce",
        str(data),
        "--clip",
        str(tmp_path / "clip"),
        "--out",
        str(tmp_path / "ipce"),
        "--steps",
        "3",
        "--learning-rate",
        "0.001",
        "--json",
    )
    report = json.loads(out.splitlines()[-1])  # libraries may announce themselves before it
    assert code == 0 and report["images"] + report["held_out_images"] == 40 and 0 <= report["pairs"] <= 1
    image, prompt = templates()[:1], [captions()[0]]
    before, after = (
        float(Ipce(Ipce.Config(weights=str(tmp_path / name)))(image, prompt)[0]) for name in ("clip", "ipce")
    )
    assert 0 <= after <= 5 and after != before


def test_ipce_without_a_model_or_captions_is_refused_with_what_is_missing(acpo, tmp_path):
    data = str(captioned_parquet(tmp_path / "set.parquet", 12))
    code, _, err = acpo("rewards", "train", "ipce", data)
    assert code == 2 and "--clip" in err
    save_tiny_clip(tmp_path / "clip", new_tiny_clip())
    code, _, err = acpo("rewards", "train", "ipce", data, "--clip", str(tmp_path / "clip"), "--prompt-column", "text")
    assert code == 2 and "no column `text`" in err


# Evaluators of a run, on its own images


def test_windows_are_cut_at_the_images_own_resolution(tmp_path):
    stripes = torch.zeros(3, 80, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    for name in "abc":
        Image.fromarray(stripes.permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
    images = native_images(tmp_path, "image")
    assert [tuple(image.shape) for image in images] == [(3, 80, 64)] * 3
    keep = {"none": lambda images, severity, generator: images}
    windows, severity = damaged_windows(images, keep, 0, 3)(8, torch.Generator().manual_seed(0))
    assert windows.shape == (8, 3, 32, 32) and severity.shape == (8,)
    # Stripes of one pixel would be grey in an image shrunk to 32.
    assert set(windows.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("family", [BASE_DAMAGE, JUDGE_DAMAGE])
def test_images_of_a_windows_size_are_damaged_whole_as_ever(family):
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    first, second = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    windows, severity = damaged_windows(images, family, 2, 12)(16, first)
    rows = torch.randint(2, 12, (16,), generator=second)
    wanted, labels = spoil(images[rows].float() / 255, family, second)
    assert torch.equal(windows, wanted) and torch.equal(severity, labels)


@pytest.mark.parametrize("family", [BASE_DAMAGE, JUDGE_DAMAGE])
def test_every_damage_works_on_windows_of_larger_images(family):
    images = [torch.full((3, 90, 70), 100, dtype=torch.uint8), torch.full((3, 64, 200), 50, dtype=torch.uint8)]
    windows, _ = damaged_windows(images, family, 0, 2)(64, torch.Generator().manual_seed(0))
    assert windows.shape == (64, 3, 32, 32) and bool(torch.isfinite(windows).all())
