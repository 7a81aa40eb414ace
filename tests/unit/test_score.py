"""`acpo score` accepts all sources of images, and shows the distribution of scores."""

import json
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from acpo_dist.data.decoding import at_once
from acpo_dist.tracking.histogram import text_histogram


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(image.numpy()).save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    return tmp_path


def paths(out: str) -> list[str]:
    return [row["path"] for row in json.loads(out)["scores"]]


def test_patterns_in_quotes_are_looked_up(acpo, folder):
    code, out, _ = acpo("score", f"{folder}/**/*", "--reward", "sharpness", "--json")
    assert code == 0 and [Path(name).name for name in paths(out)] == ["1.png", "2.png", "3.png"]
    code, _, err = acpo("score", f"{folder}/*.jpg", "--reward", "sharpness")
    assert code == 2 and "matches no image" in err


def test_rows_of_a_parquet_file_are_numbered_and_an_empty_one_is_named_and_passed_over(acpo, folder):
    def encoded(name: str) -> bytes:
        buffer = BytesIO()
        Image.open(folder / name).save(buffer, "PNG")
        return buffer.getvalue()

    file = folder / "set.parquet"
    pq.write_table(pa.table({"image": pa.array([encoded("a/1.png"), None, encoded("b/3.png")], pa.binary())}), file)
    code, out, err = acpo("score", str(file), "--reward", "sharpness", "--json")
    assert code == 1 and paths(out) == [f"{file}#0", f"{file}#2"] and "row 1" in err


def test_an_image_that_a_reward_cannot_score_is_named_and_the_others_keep_their_scores(acpo, folder):
    Image.new("RGB", (32, 32), (0, 200, 0)).save(folder / "a" / "0_green.png")
    for name in ("1.png", "2.png"):
        Image.new("RGB", (32, 32), (150, 80, 90)).save(folder / "a" / name)
    Image.new("RGB", (32, 20), (200, 0, 0)).save(folder / "a" / "9_low.png")
    rewards = ["--reward", "tests.helpers.judges:FailsOnGreen", "--reward", "two_stream"]
    code, out, err = acpo("score", str(folder), *rewards, "--json", "--csv", str(folder / "s.csv"))
    rows = {Path(row.pop("path")).name: list(row.values()) for row in json.loads(out)["scores"]}
    assert code == 1 and "Traceback" not in err
    assert rows["0_green.png"][0] is None and rows["0_green.png"][1] > 0
    assert rows["9_low.png"][0] == pytest.approx(200 / 255 / 3) and rows["9_low.png"][1] is None
    assert all(None not in rows[name] for name in ("1.png", "2.png"))
    assert "0_green.png: reward `tests.helpers.judges:FailsOnGreen` raised ValueError: 1 images are green" in err
    assert "9_low.png: `two_stream` needs images of at least 32 x 32, found 20 x 32" in err
    assert len((folder / "s.csv").read_text().splitlines()) == 6


def test_a_table_that_cannot_be_written_is_refused_before_anything_is_scored(acpo, folder):
    arguments = [str(folder), "--reward", "tests.helpers.judges:FailsOnGreen"]
    code, _, err = acpo("score", *arguments, "--csv", str(folder / "a" / "notes.txt" / "s.csv"))
    assert code == 2 and "cannot be written" in err and "Traceback" not in err
    code, _, err = acpo("score", *arguments, "--csv", str(folder / "a"))
    assert code == 2 and "cannot be written" in err


def test_large_images_are_stacked_by_fewer_than_small_ones():
    stacked = [at_once(torch.empty(3, *size), 16) for size in ((512, 512), (1024, 1024), (2048, 2048), (6000, 4000))]
    assert stacked == [16, 16, 4, 1]


def test_the_distribution_is_shown_as_text_and_drawn(acpo, folder):
    drawing = folder / "out" / "scores.png"
    code, _, err = acpo(
        "score",
        str(folder / "a"),
        str(folder / "b"),
        "--reward",
        "sharpness",
        "--reward",
        "saturation",
        "--histogram",
        "--plot",
        str(drawing),
    )
    assert code == 0 and "sharpness, 3 images" in err and "█" in err
    with Image.open(drawing) as image:
        assert image.format == "PNG" and len(image.convert("L").getcolors() or []) > 3
    code, _, err = acpo("score", str(folder), "--plot", "scores.doc")
    assert code == 2 and ".png" in err


def test_a_histogram_counts_every_value_once_and_tells_its_edges_apart():
    lines = text_histogram([0.001, 0.0011, 0.0012, 0.0012, 0.002], bins=4)
    assert [int(line.split()[-1]) for line in lines] == [4, 0, 0, 1]
    edges = [line.split()[0] for line in lines]
    assert len(set(edges)) == 4
    assert lines[0].count("█") == 40 and lines[3].count("█") == 10 and "█" not in lines[1]
    assert [int(line.split()[-1]) for line in text_histogram([5.0, 5.0], bins=3)] == [0, 2, 0]
