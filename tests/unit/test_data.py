"""Sets of images: decoded without loss or rejected."""

import zipfile
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from acpo_dist.core.errors import DataError
from acpo_dist.data.images import count_images, load_images, read_images
from tests.helpers.data import shared
from tests.helpers.images import as_tensor, encode, image, write_parquet


@pytest.mark.parametrize("kind", ["bytes", "struct", "large binary"])
def test_images_come_out_of_parquet_bit_by_bit(tmp_path, kind):
    pixels = [image(seed, width=5, height=4) for seed in range(3)]
    values = [encode(each) for each in pixels]
    if kind == "struct":
        values = [{"bytes": value, "path": None} for value in values]
    if kind == "large binary":
        values = pa.array(values, pa.large_binary())
    images = load_images(write_parquet(tmp_path / "p.parquet", values, "photo"), "photo")
    assert images.tensor.dtype == torch.uint8
    assert torch.equal(images.tensor, torch.stack([as_tensor(each) for each in pixels]))


@pytest.mark.parametrize("indices", [[2, 0], torch.tensor([2, 0])], ids=["list", "tensor"])
def test_a_batch_is_float_in_zero_to_one_in_the_requested_order(tmp_path, indices):
    pixels = [np.full((2, 2, 3), level, np.uint8) for level in (0, 51, 255)]
    images = load_images(write_parquet(tmp_path / "p.parquet", [encode(each) for each in pixels]), "image")
    batch = images.batch(indices)
    assert len(images) == 3
    assert batch.dtype == torch.float32 and batch.shape == (2, 3, 2, 2)
    assert batch[0].unique().tolist() == [1.0] and batch[1].unique().tolist() == [0.0]


def test_max_images_uses_only_the_first_images(tmp_path):
    values = [encode(image(0)), encode(image(1)), b"damaged, but never reached"]
    images = load_images(write_parquet(tmp_path / "p.parquet", values), "image", max_images=2)
    assert torch.equal(images.tensor[1], as_tensor(image(1)))
    assert len(images) == 2


def test_rows_beyond_one_record_batch_keep_their_order(tmp_path):
    pixels = [np.full((1, 1, 3), (row // 256, row % 256, 7), np.uint8) for row in range(600)]
    images = load_images(write_parquet(tmp_path / "p.parquet", [encode(each) for each in pixels]), "image")
    assert (images.tensor[:, 0].int() * 256 + images.tensor[:, 1].int()).flatten().tolist() == list(range(600))


def test_a_wide_and_a_tall_image_are_cropped_to_their_centre(tmp_path):
    wide, tall = image(0, width=10, height=6), image(1, width=6, height=9)
    path = write_parquet(tmp_path / "p.parquet", [encode(wide), encode(tall)])
    images = load_images(path, "image", size=6)
    assert torch.equal(images.tensor[0], as_tensor(wide[:, 2:8]))
    assert torch.equal(images.tensor[1], as_tensor(tall[1:7]))


def test_an_image_of_another_size_is_resized_without_aliasing(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 254
    path = write_parquet(tmp_path / "p.parquet", [encode(stripes), encode(image(0, 16, 16))])
    images = load_images(path, "image", size=16)
    assert images.tensor.shape == (2, 3, 16, 16)
    # Stripes of one pixel become their mean, 127; a filter that skips pixels would leave 254. The border is cut off.
    assert (images.tensor[0, :, :, 2:-2].int() - 127).abs().max() <= 3
    assert torch.equal(images.tensor[1], as_tensor(image(0, 16, 16)))


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    colour = Image.fromarray(image(0))
    buffers = [BytesIO() for _ in range(3)]
    for buffer, mode in zip(buffers, ("L", "P", "RGBA"), strict=True):
        colour.convert(mode).save(buffer, "PNG")
    path = write_parquet(tmp_path / "p.parquet", [buffer.getvalue() for buffer in buffers])
    images = load_images(path, "image")
    grey = torch.from_numpy(np.asarray(colour.convert("L")).copy())
    assert all(torch.equal(images.tensor[0, channel], grey) for channel in range(3))
    assert torch.equal(images.tensor[2], as_tensor(image(0)))


def test_damaged_rows_are_counted_and_the_first_is_named(tmp_path):
    good = encode(image(0), "JPEG")
    values = [good, good, good[: len(good) // 2], good, b"no image", None, b""]
    with pytest.raises(DataError, match=r"4 rows .* the first is row 2 \(counted from 0\)"):
        load_images(write_parquet(tmp_path / "p.parquet", values), "image")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_images_are_scaled_to_eight_bits(tmp_path, kind):
    values = np.array([[0, 257], [128 * 257, 65535]], np.uint16)
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, kind)
    found = load_images(write_parquet(tmp_path / "p.parquet", [buffer.getvalue()]), "image").tensor
    assert found[0, 0].tolist() == [[0, 1], [128, 255]]


def test_floating_point_images_are_refused_since_their_range_is_unknown(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "image.tif")
    with pytest.raises(DataError, match="mode F"):
        list(read_images([tmp_path / "image.tif"]))


@pytest.mark.parametrize(("ending", "kind"), [("avif", "AVIF"), ("jfif", "JPEG"), ("jp2", "JPEG2000"), ("tga", "TGA")])
def test_a_folder_of_any_image_format_is_training_data(tmp_path, ending, kind):
    for index in range(3):
        Image.fromarray(image(index, 32, 32)).save(tmp_path / f"{index}.{ending}", kind)
    assert load_images(tmp_path, "image").tensor.shape[0] == 3
    assert load_images(tmp_path, "image", max_images=2).tensor.shape[0] == 2


def test_files_that_are_skipped_are_counted_by_ending_and_named(tmp_path, caplog):
    Image.fromarray(image(0)).save(tmp_path / "0.png")
    for name in ("0.txt", "clip.mp4", "other.mp4", "raw.cr2"):
        (tmp_path / name).write_bytes(b"")
    assert len(load_images(tmp_path, "image")) == 1
    assert "3 files" in caplog.text and "1 .cr2, 2 .mp4" in caplog.text and "clip.mp4" in caplog.text


def test_a_folder_of_parquet_files_is_read_shard_by_shard(tmp_path):
    for index in range(2):
        write_parquet(tmp_path / f"part-{index}.parquet", [encode(image(index))])
    assert [name.rpartition("/")[2] for name, _ in read_images([tmp_path])] == ["part-0.parquet#0", "part-1.parquet#0"]


def test_images_of_a_zip_archive_are_read_in_sorted_order(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("b/1.png", "a/0.png", "__MACOSX/._0.png", "notes.txt"):
            archive.writestr(name, encode(image(0)))
    path = tmp_path / "images.zip"
    assert [name.rpartition("#")[2] for name, _ in read_images([path])] == ["a/0.png", "b/1.png"]
    assert count_images([path]) == 2 and len(load_images(path, "image")) == 2


def test_a_parquet_row_without_bytes_names_a_file_beside_the_parquet_file(tmp_path):
    (tmp_path / "files").mkdir()
    Image.fromarray(image(3)).save(tmp_path / "files/3.png")
    rows = [{"bytes": None, "path": "files/3.png"}, {"bytes": encode(image(1)), "path": None}]
    path = write_parquet(tmp_path / "p.parquet", rows)
    assert len(load_images(path, "image")) == 2


def test_a_dictionary_column_is_decoded(tmp_path):
    column = pa.array([encode(image(0))] * 3).dictionary_encode()
    pq.write_table(pa.table({"image": column}), tmp_path / "p.parquet")
    assert len(load_images(tmp_path / "p.parquet", "image")) == 3


def test_different_sizes_need_a_common_size(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [encode(image(0)), encode(image(1, width=8, height=7))])
    with pytest.raises(DataError, match="row 1 is 8x7 pixels, earlier rows are 6x6"):
        load_images(path, "image")
    assert len(load_images(path, "image", size=6)) == 2


def test_an_absent_column_is_answered_with_those_there_are(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [encode(image(0))], "photo")
    with pytest.raises(DataError, match=r"no column `image`\. Columns found: photo, label"):
        load_images(path, "image")


@pytest.mark.parametrize(
    "values", [["a.png"], [{"path": "a.png"}], [{"bytes": "text"}]], ids=["text", "struct", "inner"]
)
def test_a_column_of_another_type_is_refused_with_its_type(tmp_path, values):
    with pytest.raises(DataError, match=r"column `image` is of type .*string.*; expected encoded images"):
        load_images(write_parquet(tmp_path / "p.parquet", values), "image")


def test_a_file_that_is_missing_empty_or_no_parquet_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"no such file: .*absent\.parquet"):
        load_images(tmp_path / "absent.parquet", "image")
    (tmp_path / "text.parquet").write_text("not at all")
    with pytest.raises(DataError, match=r"text\.parquet is not a readable parquet file"):
        load_images(tmp_path / "text.parquet", "image")
    with pytest.raises(DataError, match=r"empty\.parquet: column `image` holds no image"):
        load_images(write_parquet(tmp_path / "empty.parquet", pa.array([], pa.binary())), "image")


def test_cifar_decodes_to_images_of_its_known_brightness():
    images = load_images(shared("cifar10_train.parquet"), "image", max_images=1000)
    assert images.tensor.shape == (1000, 3, 32, 32)
    assert 0.4 < images.batch(range(1000)).mean() < 0.55
