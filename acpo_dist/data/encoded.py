"""Images as encoded bytes with their names and captions: a file, a folder, a zip archive, or parquet files."""

import glob
import hashlib
import json
import logging
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePath, PurePosixPath

import pyarrow.parquet as pq

from acpo_dist.core.errors import DataError
from acpo_dist.data.captions import CAPTION_COLUMNS, caption_of, find_captions
from acpo_dist.data.folders import files_below
from acpo_dist.data.images import archived_images, expand, is_archive, is_parquet, unpack
from acpo_dist.data.parquet_images import encoded_cell, open_parquet, parquet_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """One image file, entry of an archive, or row of a parquet file; not decoded yet."""

    name: str
    """Path relative to the given folder; for a row `FILE#ROW`, for an entry of an archive `FILE#ENTRY`."""
    key: str
    """Key that pairs the image with an image of another set: the path without its suffix, or the row."""
    prompt: str
    """Caption; empty if unknown."""
    source: bytes | Path | None = field(repr=False)
    """Encoded bytes, path of the image file, or None for an empty row."""

    @property
    def data(self) -> bytes | None:
        """Encoded bytes.

        Raises:
            DataError: the file cannot be read.
        """
        if not isinstance(self.source, Path):
            return self.source
        try:
            return self.source.read_bytes()
        except OSError as error:
            raise DataError(f"{self.source} cannot be read: {error}") from error

    @property
    def sha256(self) -> str:
        """SHA-256 of the encoded bytes."""
        return digest(self.data or b"")


def digest(data: bytes) -> str:
    """Return the SHA-256 as hexadecimal text."""
    return hashlib.sha256(data).hexdigest()


class EncodedImages:
    """All images of a file or folder, in the order of `data.images.read_images`, with their captions."""

    def __init__(
        self, path: Path, *, image_column: str = "image", caption_columns: Sequence[str] = CAPTION_COLUMNS
    ) -> None:
        """List the images; none is read.

        Args:
            path: image file, parquet file, zip archive, or folder of any of these.
            image_column: column of parquet files with the encoded image.
            caption_columns: columns of parquet files and `metadata` files with the caption; the first one that exists
                is used, and all may be absent.

        Raises:
            DataError: the path is missing, unreadable, holds no image, or lacks the image column.
        """
        self._path, self._image, self._captions = path, image_column, tuple(caption_columns)
        self._files = expand(path, image_column)
        self._root = path if path.is_dir() else path.parent
        self._kind = "parquet" if is_parquet(self._files[0]) else "archive" if is_archive(self._files[0]) else "files"
        self._entries = (
            [(file, name) for file in self._files for name in archived_images(file)] if self._kind == "archive" else []
        )
        self._count = (
            sum(pq.read_metadata(file).num_rows for file in self._files) if self._kind == "parquet"
            else len(self._entries) if self._kind == "archive"
            else len(self._files)
        )  # fmt: skip

    def __len__(self) -> int:
        """Return the number of images."""
        return self._count

    def stamp(self) -> str:
        """Return a hash of the names and byte counts of the files."""
        facts = [[os.path.relpath(file, self._root), file.stat().st_size] for file in self._files]
        return digest(json.dumps(facts).encode())

    def read(self, indices: Sequence[int] | None = None) -> Iterator[EncodedImage]:
        """Return images in order.

        Args:
            indices: ascending positions; None returns all.

        Raises:
            DataError: a file is damaged.
        """
        wanted = range(self._count) if indices is None else indices
        if self._kind == "parquet":
            return self._rows(frozenset(wanted))
        return self._from_archives(wanted) if self._kind == "archive" else self._from_files(wanted)

    def captions(self) -> list[str]:
        """Return the caption of every image, "" where there is none, without reading the images."""
        if self._kind == "files":
            return [self._beside.get(file, "") for file in self._files]
        if self._kind == "archive":
            return [image.prompt for image in self._from_archives(range(self._count), content=False)]
        found: list[str] = []
        for path in self._files:
            with open_parquet(path, self._image) as file:
                named = [name for name in self._captions if name in file.schema_arrow.names][:1]
                rows = parquet_rows(file, path, named) if named else [{}] * file.metadata.num_rows
                found += [caption_of(row, named) or "" for row in rows]
        return found

    def _from_files(self, wanted: Sequence[int]) -> Iterator[EncodedImage]:
        names = [Path(os.path.relpath(file, self._root)) for file in self._files]
        stems = Counter(name.with_suffix("") for name in names)
        for index in wanted:
            name = names[index]
            # The suffix is dropped so that PNGs pair with JPEGs, unless two files differ only in it.
            key = name if stems[name.with_suffix("")] > 1 else name.with_suffix("")
            yield EncodedImage(
                name=name.as_posix(), key=key.as_posix(), prompt=self._beside.get(self._files[index], ""),
                source=self._files[index],
            )  # fmt: skip

    @cached_property
    def _beside(self) -> dict[PurePath, str]:
        """Caption by file."""
        around = files_below(self._path) if self._path.is_dir() else _same_stem(self._path)
        others = sorted(set(around) - set(self._files))
        return find_captions(self._path, self._files, others, lambda path: Path(path).read_bytes(), self._captions)

    def _from_archives(self, wanted: Sequence[int], *, content: bool = True) -> Iterator[EncodedImage]:
        for file, entries in groupby((self._entries[index] for index in wanted), key=itemgetter(0)):
            place = os.path.relpath(file, self._root) if self._path.is_dir() else file.name
            with zipfile.ZipFile(file) as archive:
                captions = self._in_archive(file, archive)
                for _, name in entries:
                    try:
                        data = unpack(archive, name) if content else None
                    except ValueError as error:
                        logger.warning("%s, entry %s: %s", file, name, error)
                        data = b""
                    yield EncodedImage(
                        name=f"{place}#{name}", key=PurePosixPath(name).with_suffix("").as_posix(),
                        prompt=captions.get(PurePosixPath(name), ""), source=data,
                    )  # fmt: skip

    def _in_archive(self, file: Path, archive: zipfile.ZipFile) -> dict[PurePath, str]:
        images = [PurePosixPath(name) for place, name in self._entries if place == file]
        names = [PurePosixPath(info.filename) for info in archive.infolist() if not info.is_dir()]
        others = sorted(set(names) - set(images))

        def read(path: PurePath) -> bytes:
            try:
                return unpack(archive, str(path))
            except ValueError as error:
                raise DataError(f"{file}, entry {path}: {error}") from error

        return find_captions(file, images, others, read, self._captions)

    def _rows(self, wanted: frozenset[int]) -> Iterator[EncodedImage]:
        index = 0
        for path in self._files:
            with open_parquet(path, self._image) as file:
                named = [name for name in self._captions if name in file.schema_arrow.names][:1]
                name = os.path.relpath(path, self._root) if self._path.is_dir() else path.name
                first = index
                for group in range(file.metadata.num_row_groups):
                    rows = range(index, index + file.metadata.row_group(group).num_rows)
                    index = rows.stop
                    # A row group without a wanted row is not read.
                    if wanted.isdisjoint(rows):
                        continue
                    found = parquet_rows(file, path, [self._image, *named], groups=[group])
                    for position, cells in zip(rows, found, strict=True):
                        if position not in wanted:
                            continue
                        row = position - first
                        key = f"{name}#{row:06d}" if self._path.is_dir() else f"row {row:06d}"
                        yield EncodedImage(
                            name=f"{name}#{row}", key=key, prompt=caption_of(cells, named) or "",
                            source=encoded_cell(cells[self._image], path),
                        )  # fmt: skip


def _same_stem(path: Path) -> list[Path]:
    return [file for file in path.parent.glob(f"{glob.escape(path.stem)}.*") if file.is_file()]
