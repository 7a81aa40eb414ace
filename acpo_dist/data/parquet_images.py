"""Columns of a parquet file: encoded images, texts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from acpo_dist.core.errors import DataError, quoted, shorten
from acpo_dist.data.decoding import MAX_FILE_BYTES

_ROWS_AT_ONCE = 256
_MOST_PACKED = 20
"""Factor by which a column of images or texts may unpack; repeated ones are packed well."""


def open_parquet(path: Path, column: str) -> pq.ParquetFile:
    """Open a parquet file and check that its column can hold images.

    Args:
        path: parquet file.
        column: image column.

    Returns:
        The open file.

    Raises:
        DataError: the file is missing or no parquet file, or the column is absent or of another type.
    """
    if not Path(path).is_file():
        raise DataError(f"no such file: {path}")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {shorten(str(error))}") from error
    schema = file.schema_arrow
    if schema.names.count(column) != 1:
        file.close()
        raise DataError(f"{path} has no column `{column}`. Columns found: {', '.join(schema.names)}.")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not _is_bytes(kind.field("bytes").type if _has_bytes(kind) else kind):
        file.close()
        raise DataError(
            f"{path}: column `{column}` is of type {kind}; expected encoded images as binary, or a struct with a "
            "binary field `bytes`."
        )
    return file


def _has_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def encoded_rows(file: pq.ParquetFile, path: Path, column: str) -> Iterator[bytes | Path | None]:
    """Read the encoded image of every row.

    Args:
        file: open parquet file.
        path: its path.
        column: image column.

    Returns:
        Iterator over bytes, paths of image files, or None for empty cells.

    Raises:
        DataError: the file is damaged.
    """
    for row in parquet_rows(file, path, [column]):
        yield encoded_cell(row[column], path)


def parquet_rows(
    file: pq.ParquetFile, path: Path, columns: Sequence[str], *, groups: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Read rows as dictionaries; dictionary-encoded columns hold their values.

    Args:
        file: open parquet file.
        path: its path.
        columns: columns to read.
        groups: row groups to read; None reads all.

    Raises:
        DataError: the file is damaged, or a row group unpacks to many times its size.
    """
    for column in columns:
        require_honest(file, path, column)
    try:
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=list(columns)):
            # Value by value: a batch of decoded rows would hold its images twice.
            for cells in zip(*(batch.column(column) for column in columns), strict=True):
                yield {column: cell.as_py() for column, cell in zip(columns, cells, strict=True)}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {shorten(str(error))}") from error


def require_honest(file: pq.ParquetFile, path: Path, column: str) -> None:
    """Refuse row groups that unpack to many times their size, as encoded images and texts do not.

    Raises:
        DataError: a row group of the column is a bomb.
    """
    for group in range(file.metadata.num_row_groups):
        chunks = [file.metadata.row_group(group).column(index) for index in range(file.metadata.num_columns)]
        for chunk in chunks:
            unpacked, packed = chunk.total_uncompressed_size, max(1, chunk.total_compressed_size)
            if chunk.path_in_schema.split(".")[0] == column and unpacked > max(MAX_FILE_BYTES, _MOST_PACKED * packed):
                raise DataError(
                    f"{path}: row group {group} of `{column}` unpacks from {packed >> 10} KiB to {unpacked >> 20} MiB, "
                    "which images and texts do not; the file is not read."
                )


def encoded_cell(value: Any, parquet: Path) -> bytes | Path | None:
    """Return the content of a cell; a struct without bytes names a file relative to the parquet file.

    Raises:
        DataError: the named file is outside the folder of the parquet file.
    """
    if not isinstance(value, dict):
        return value
    content = value.get("bytes")
    if not content and value.get("path"):
        root = parquet.parent.resolve()
        if not (root / value["path"]).resolve().is_relative_to(root):
            raise DataError(
                f"{parquet}: a row names {quoted(value['path'])}, which is not in the folder of the parquet file. Put "
                "the images beside it, or write their bytes into the rows."
            )
        return parquet.parent / value["path"]
    return content
