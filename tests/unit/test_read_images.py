"""Images of files, folders and parquet files, read one at a time for scoring."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acpo_dist.core.errors import DataError
from acpo_dist.data.decoding import decode_named
from acpo_dist.data.encoded import EncodedImages
from acpo_dist.data.folders import files_below
from acpo_dist.data.images import count_images, read_images
from tests.helpers.data import shared
from tests.helpers.images import as_tensor, encode, image, write_parquet


def test_files_folders_and_parquet_are_read_in_order_and_without_loss(tmp_path):
    pixels = [image(seed, width=4 + seed, height=5) for seed in range(5)]
    Image.fromarray(pixels[0]).save(tmp_path / "single.png")
    (tmp_path / "folder/deep").mkdir(parents=True)
    Image.fromarray(pixels[1]).save(tmp_path / "folder/a.bmp")
    Image.fromarray(pixels[2]).save(tmp_path / "folder/deep/0.PNG")
    (tmp_path / "folder/notes.txt").write_text("no image")
    (tmp_path / "folder/._a.png").write_bytes(b"left by an archive")
    write_parquet(tmp_path / "set.parquet", [encode(each) for each in pixels[3:]])
    found = list(read_images([tmp_path / "single.png", tmp_path / "folder", tmp_path / "set.parquet"]))
    names = ["single.png", "folder/a.bmp", "folder/deep/0.PNG", "set.parquet#0", "set.parquet#1"]
    assert [name for name, _ in found] == [str(tmp_path / name) for name in names]
    assert all(torch.equal(tensor, as_tensor(each)) for (_, tensor), each in zip(found, pixels, strict=True))


def test_a_folder_is_read_in_sorted_order(tmp_path):
    for number in (7, 2, 9, 0, 4, 11, 1, 8, 3, 10, 6, 5):
        Image.fromarray(image(number)).save(tmp_path / f"{number:02d}.png")
    names = [Path(name).name for name, _ in read_images([tmp_path])]
    assert names == [f"{number:02d}.png" for number in range(12)]


def test_a_file_that_is_reached_twice_is_read_once(tmp_path):
    Image.fromarray(image(0)).save(tmp_path / "a.png")
    assert len(list(read_images([tmp_path / "a.png", tmp_path, tmp_path / "../" / tmp_path.name / "a.png"]))) == 1


def test_images_are_decoded_one_at_a_time(tmp_path):
    Image.fromarray(image(0)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"damaged")
    images = read_images([tmp_path])
    assert next(images)[0].endswith("a.png")
    with pytest.raises(DataError, match=r"b\.png cannot be read as an image"):
        next(images)


def test_a_damaged_parquet_row_is_named_with_its_file(tmp_path):
    path = write_parquet(tmp_path / "set.parquet", [encode(image(0)), b"damaged"])
    with pytest.raises(DataError, match=r"set\.parquet, row 1 of column `image` cannot be read as an image"):
        list(read_images([path]))


def test_missing_and_empty_places_are_refused_before_anything_is_decoded(tmp_path):
    Image.fromarray(image(0)).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("no image")
    for place, message in (("absent.png", "no such file or folder"), ("empty", "holds no image: 1 files")):
        with pytest.raises(DataError, match=message):
            read_images([tmp_path / "a.png", tmp_path / place])
    path = write_parquet(tmp_path / "set.parquet", [encode(image(0))], "photo")
    with pytest.raises(DataError, match="Columns found: photo, label"):
        read_images([tmp_path / "a.png", path])
    assert len(list(read_images([path], column="photo"))) == 1


def test_real_images_are_read_at_their_own_size():
    name, tensor = next(read_images([shared("drawbench_sd14_512px.parquet")]))
    assert name.endswith("drawbench_sd14_512px.parquet#0")
    assert tensor.shape == (3, 512, 512) and tensor.dtype == torch.uint8 and tensor.is_contiguous()


def test_rows_behind_a_damaged_one_are_still_read_when_it_is_skipped(tmp_path):
    rows = [encode(image(0)), b"damaged", encode(image(1)), None, encode(image(2))]
    path = write_parquet(tmp_path / "set.parquet", rows)
    skipped: list[str] = []
    names = [name.rpartition("#")[2] for name, _ in read_images([path], skip=skipped.append)]
    assert names == ["0", "2", "4"]
    assert ["row 1" in skipped[0], "row 3" in skipped[1], len(skipped)] == [True, True, 2]


def test_the_exif_orientation_is_applied(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    paths = []
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        paths.append(tmp_path / f"{orientation}.png")
        Image.fromarray(noise).save(paths[-1], exif=exif)
    # Scenes for each meaning of row 0 and column 0 in the standard.
    scenes = [
        noise, noise[:, ::-1], noise[::-1, ::-1], noise[::-1], noise.swapaxes(0, 1), np.rot90(noise, -1),
        noise[::-1, ::-1].swapaxes(0, 1), np.rot90(noise),
    ]  # fmt: skip
    for path, scene, (_, found) in zip(paths, scenes, read_images(paths), strict=True):
        assert np.array_equal(found.permute(1, 2, 0), scene), path.name
        assert torch.equal(decode_named(path.read_bytes(), path.name), found)
    exif[0x0112] = 6
    Image.fromarray(noise).save(tmp_path / "damaged.jpg", exif=exif, quality=95)
    broken = (tmp_path / "damaged.jpg").read_bytes().replace(b"Exif\0\0MM", b"Exif\0\0XX")
    (tmp_path / "damaged.jpg").write_bytes(broken)
    ((_, image),) = read_images([tmp_path / "damaged.jpg"])
    assert image.shape == (3, 6, 8)


def test_linked_folders_are_searched_and_no_folder_is_entered_twice(tmp_path):
    folder, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    for place in (folder / "z", elsewhere / "deep"):
        place.mkdir(parents=True)
    for file in (folder / "1.png", folder / "z" / "2.png", elsewhere / "deep" / "3.png", folder / ".hidden.png"):
        Image.new("RGB", (8, 8)).save(file)
    (folder / "more").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder / "z")
    (elsewhere / "loop").symlink_to(folder)
    names = [str(file.relative_to(folder)) for file in files_below(folder)]
    assert names == ["1.png", "more/deep/3.png", "z/2.png"]
    assert count_images([folder]) == len(EncodedImages(folder)) == 3


def test_a_folder_that_cannot_be_listed_and_a_link_to_nothing_are_named_rather_than_passed_over():
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)
        Image.new("RGB", (8, 8)).save(folder / "1.png")
        (folder / "secret").mkdir(mode=0o000)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)  # nothing is closed to root
            for count in (count_images, lambda paths: EncodedImages(paths[0])):
                with pytest.raises(DataError, match=r"secret cannot be listed \(Permission denied\)"):
                    count([folder])
        finally:
            if root:
                os.seteuid(0)
        (folder / "secret").rmdir()
        (folder / "2.png").symlink_to("nowhere.png")
        with pytest.raises(DataError, match=r"2\.png cannot be read"):
            list(read_images([folder]))
        with pytest.raises(DataError, match=r"2\.png cannot be read"):
            [image.data for image in EncodedImages(folder).read([0, 1])]
