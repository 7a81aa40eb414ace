"""Encoded images are read by position from parquet files with several row groups and from several archives."""

import io
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from acpo_dist.data.encoded import EncodedImages


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def check(path: Path, count: int, wanted: list[int]) -> None:
    images = EncodedImages(path)
    whole = list(images.read())
    assert len(images) == len(whole) == count
    assert [image.data for image in whole] == [png(shade) for shade in range(count)]
    assert list(images.read(wanted)) == [whole[index] for index in wanted]
    assert images.captions() == [image.prompt for image in whole] == [f"shade {shade}" for shade in range(count)]


def test_rows_of_wanted_row_groups_have_their_position_in_the_file(tmp_path):
    for shard, (first, last) in enumerate(((0, 7), (7, 12))):
        rows = range(first, last)
        table = pa.table({"image": [png(row) for row in rows], "caption": [f"shade {row}" for row in rows]})
        pq.write_table(table, tmp_path / f"{shard}.parquet", row_group_size=3)
    check(tmp_path, 12, [0, 5, 6, 11])


def test_entries_of_several_archives_have_their_captions(tmp_path):
    for shard, (first, last) in enumerate(((0, 3), (3, 5))):
        with zipfile.ZipFile(tmp_path / f"{shard}.zip", "w") as archive:
            for row in range(first, last):
                archive.writestr(f"{row}.png", png(row))
                archive.writestr(f"{row}.txt", f"shade {row}")
    check(tmp_path, 5, [1, 2, 4])
