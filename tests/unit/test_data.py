"""Prompts are sampled reproducibly and once per pass; images are decoded without loss or refused."""

import logging
import os
import tempfile
import zipfile
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from acpo_dist.core.errors import DataError
from acpo_dist.data.decoding import decode_named
from acpo_dist.data.encoded import EncodedImages
from acpo_dist.data.folders import files_below
from acpo_dist.data.images import count_images, load_images, read_images
from acpo_dist.data.prompts import load_prompts, sample_prompts
from acpo_dist.data.toy.world import captions
from tests.helpers.data import DATA


def shared(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"needs {name}: set ACPO_TEST_DATA to a folder that holds it")
    return DATA / name


def image(seed: int, width: int = 6, height: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path: Path, values: list, column: str = "image") -> Path:
    pq.write_table(pa.table({column: values, "label": list(range(len(values)))}), path)
    return path


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def ids_of(groups) -> list[str]:
    return [sample.sample_id for group in groups for sample in group.samples]


def seeds_of(groups) -> list[int]:
    return [sample.seed for group in groups for sample in group.samples]


# Prompts from files


def test_toy_prompts_are_the_captions_of_the_world():
    assert load_prompts("toy", "prompt") == captions()


def test_no_prompts_is_one_empty_prompt():
    assert load_prompts("none", "prompt") == ("",)


def test_a_text_file_gives_one_prompt_per_line_without_the_blank_ones(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat, sitting\n\n  a dog \r\n   \nein Hündchen".encode())
    with caplog.at_level(logging.INFO):
        assert load_prompts(str(path), "ignored") == ("a cat, sitting", "a dog", "ein Hündchen")
    assert "2 blank prompts dropped, 3 kept" in caplog.text


@pytest.mark.parametrize("column", ["Prompt", "prompt", "PROMPT"])
def test_a_csv_column_is_found_in_any_case(tmp_path, column):
    path = tmp_path / "prompts.csv"
    path.write_text('id, Prompt,note\n1,"a cat, sitting",x\n2,,x\n3,"two\nlines",x\n')
    assert load_prompts(str(path), column) == ("a cat, sitting", "two\nlines")


def test_the_exact_column_wins_over_one_in_another_case(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("PROMPT,prompt\nwrong,right\n")
    assert load_prompts(str(path), "prompt") == ("right",)


def test_tsv_prompts_keep_their_quotes(tmp_path):
    path = tmp_path / "prompts.tsv"
    path.write_text('Prompt\tNote\n"PEACE" painted on a wall\tx\nan "unclosed quote\tx\n')
    assert load_prompts(str(path), "prompt") == ('"PEACE" painted on a wall', 'an "unclosed quote')


def test_parti_prompts_arrive_complete_and_verbatim():
    prompts = load_prompts(str(shared("PartiPrompts.tsv")), "prompt")
    assert len(prompts) == 1632
    assert sum(prompt.startswith('"G I G G L E" painted') for prompt in prompts) == 1


def test_drawbench_prompts_arrive_complete():
    prompts = load_prompts(str(shared("drawbench.csv")), "prompt")
    assert len(prompts) == 200
    assert prompts[0] == "A red colored car."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "no such file"),
        ("empty.txt", b"\n  \n", "holds no prompt"),
        ("empty.csv", b"", "is empty"),
        ("only_header.csv", b"prompt\n", "holds no prompt"),
        ("other.csv", b"text,category\na,b\n", "no column `prompt`. Columns found: text, category"),
        ("comma.csv", b"prompt\na cat, sitting\n", "line 2: 2 cells, the header has 1"),
        ("quote.csv", b'prompt\n"never closed\na dog\n', "cannot be read"),
        ("latin1.txt", "Hündchen".encode("latin-1"), "cannot be read"),
        ("prompts.json", b"[]", "expected a .txt, .csv, .tsv, .jsonl or .parquet file"),
    ],
)
def test_a_prompt_file_that_cannot_serve_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"data\.prompt") as caught:
        load_prompts(str(tmp_path / name), "prompt")
    assert message in str(caught.value)
    assert name in str(caught.value)


# Dealing


def test_sampling_prompts_twice_gives_the_same_groups():
    one, two = (
        sample_prompts(captions(), iteration=7, run_seed=3, num_prompts=5, samples_per_prompt=2) for _ in range(2)
    )
    assert one == two


def test_every_prompt_is_used_once_per_pass_across_iterations():
    prompts = tuple("abcdefg")
    used = [
        group.prompt_id
        for iteration in range(14)
        for group in sample_prompts(prompts, iteration=iteration, run_seed=1, num_prompts=3, samples_per_prompt=1)
    ]
    passes = [used[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(each) == list(range(7)) for each in passes)
    assert len({tuple(each) for each in passes}) > 1, "every pass has the same order"


def test_an_iteration_may_be_longer_than_the_prompt_list():
    groups = sample_prompts(("a", "b", "c"), iteration=2, run_seed=0, num_prompts=7, samples_per_prompt=2)
    counts = Counter(group.prompt_id for group in groups)
    assert sorted(counts.values()) in ([2, 2, 3], [1, 3, 3])
    assert len(set(ids_of(groups))) == len(set(seeds_of(groups))) == 14


def test_negative_iterations_continue_the_passes_backwards():
    used = [
        group.prompt_id
        for iteration in range(-6, 0)
        for group in sample_prompts(tuple("abcd"), iteration=iteration, run_seed=1, num_prompts=2, samples_per_prompt=1)
    ]
    assert [sorted(used[start : start + 4]) for start in (0, 4, 8)] == [[0, 1, 2, 3]] * 3


def test_a_group_names_its_prompt_in_every_sample():
    groups = sample_prompts(captions(), iteration=12, run_seed=0, num_prompts=4, samples_per_prompt=3)
    assert [len(group.samples) for group in groups] == [3] * 4
    for group in groups:
        assert group.prompt == captions()[group.prompt_id]
        assert {(sample.prompt, sample.prompt_id) for sample in group.samples} == {(group.prompt, group.prompt_id)}
    assert ids_of(groups)[4] == "000012-0001-1"


def test_no_sample_id_or_seed_is_shared_between_iterations_and_streams():
    sampled = [
        sample_prompts(("a", "b"), iteration=iteration, run_seed=0, num_prompts=3, samples_per_prompt=4, stream=stream)
        for stream in ("train", "calibration", "evaluation")
        for iteration in (-12, -1, 0, 1, 12)
    ]
    ids = [sample_id for groups in sampled for sample_id in ids_of(groups)]
    seeds = [seed for groups in sampled for seed in seeds_of(groups)]
    assert len(set(ids)) == len(set(seeds)) == len(ids) == 15 * 12


def test_another_run_seed_changes_the_order_and_every_noise_seed():
    one, two = (
        sample_prompts(captions(), iteration=0, run_seed=seed, num_prompts=48, samples_per_prompt=1) for seed in (0, 1)
    )
    assert [group.prompt_id for group in one] != [group.prompt_id for group in two]
    assert not set(seeds_of(one)) & set(seeds_of(two))


def test_sampling_prompts_never_changes_the_global_generator():
    before = torch.get_rng_state()
    sample_prompts(captions(), iteration=0, run_seed=0, num_prompts=4, samples_per_prompt=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "wrong",
    [{"num_prompts": 0}, {"samples_per_prompt": 0}, {"stream": "a-b"}, {"stream": ""}, {"prompts": ()}],
    ids=str,
)
def test_sampling_no_prompts_or_from_an_ambiguous_stream_is_refused(wrong):
    arguments = {"iteration": 0, "run_seed": 0, "num_prompts": 1, "samples_per_prompt": 1, **wrong}
    with pytest.raises(ValueError, match=r"nothing to sample|identifier"):
        sample_prompts(arguments.pop("prompts", ("a",)), **arguments)


# Image sets


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


# Reading anything for scoring


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
    # What the standard says row 0 and column 0 of the stored pixels are in the scene.
    scenes = [
        noise, noise[:, ::-1], noise[::-1, ::-1], noise[::-1], noise.swapaxes(0, 1), np.rot90(noise, -1),
        noise[::-1, ::-1].swapaxes(0, 1), np.rot90(noise),
    ]  # fmt: skip
    for path, scene, (_, image) in zip(paths, scenes, read_images(paths), strict=True):
        assert np.array_equal(image.permute(1, 2, 0), scene), path.name
        assert torch.equal(decode_named(path.read_bytes(), path.name), image)
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
