"""Read text files and tables: UTF-8 or UTF-16, with or without BOM; CSV with commas or semicolons, TSV."""

import codecs
import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from acpo_dist.core.errors import DataError

_BOMS = (
    # UTF-32 comes first because its little-endian BOM starts with the UTF-16 BOM.
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_SEPARATORS = ",;\t"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table."""

    line: int
    """First line of the row in the file, from 1."""
    cells: tuple[str, ...]
    """One cell per header column; missing cells of a short row are empty."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Header and rows of a CSV or TSV file without blank lines."""

    name: str
    """Name of the file, for messages."""
    header: tuple[str, ...]
    """Column names, stripped of whitespace."""
    rows: tuple[Row, ...]

    def place(self, column: str, key: str = "") -> int:
        """Find a column, ignoring case; an exact match takes precedence.

        Args:
            column: name of the column.
            key: configuration key or option that names the column, for the message.

        Returns:
            The index of the column.

        Raises:
            DataError: the column does not exist.
        """
        return self.header.index(find_column(self.header, column, f"{_prefix(key)}{self.name}"))

    def records(self) -> Iterator[dict[str, str]]:
        """Return the rows as dictionaries by column name."""
        return (dict(zip(self.header, row.cells, strict=True)) for row in self.rows)


def find_column(names: Sequence[str], column: str, where: str) -> str:
    """Find a column, ignoring case; an exact match takes precedence.

    Args:
        names: existing columns.
        column: name of the column.
        where: name of the file, for the message.

    Raises:
        DataError: the column does not exist.
    """
    found = column if column in names else next((n for n in names if n.casefold() == column.casefold()), None)
    if found is None:
        raise DataError(f"{where} has no column `{column}`. Columns found: {', '.join(names)}.")
    return found


def read_text(path: Path, key: str = "") -> str:
    """Read a text file in UTF-8, UTF-16 or UTF-32 and remove its BOM.

    UTF-16 without a BOM is detected by its zero bytes, which UTF-8 text does not contain.

    Args:
        path: the file.
        key: configuration key or option that names the file, for messages.

    Returns:
        The text.

    Raises:
        DataError: the file is missing, a folder, or in another encoding.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{_prefix(key)}{path} cannot be read: {error.strerror or error}") from error
    return decode_text(raw, f"{_prefix(key)}{path}")


def decode_text(raw: bytes, where: str) -> str:
    """Decode UTF-8, UTF-16 or UTF-32 text and remove its BOM.

    Args:
        raw: the bytes.
        where: name of the file, for messages.

    Raises:
        DataError: another encoding.
    """
    encoding = next((name for mark, name in _BOMS if raw.startswith(mark)), None)
    if encoding is None:
        even, odd = raw[0::2].count(0), raw[1::2].count(0)
        encoding = "utf-8" if even == odd == 0 else "utf-16-le" if odd > even else "utf-16-be"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} cannot be read: it is neither UTF-8 nor UTF-16 text ({error}). Save it as UTF-8."
        ) from error


def read_lines(path: Path, key: str = "") -> list[str]:
    """Read the lines of a text file, without line ends.

    Args:
        path: the file.
        key: as in `read_text`.

    Returns:
        The lines.

    Raises:
        DataError: as `read_text`.
    """
    return [line.rstrip("\n") for line in io.StringIO(read_text(path, key), newline=None)]


def read_table(path: Path, key: str = "") -> Table:
    """Read a `.tsv` file, whose cells have no quoting, or any other file as CSV.

    The CSV separator is the most frequent one in the header (comma, semicolon or tab), or the one named by Excel's
    first line `sep=;`.

    Args:
        path: the file.
        key: as in `read_text`.

    Returns:
        The table.

    Raises:
        DataError: the file is unreadable or empty, or a line has an unbalanced quote or more cells than the header.
    """
    return parse_table(read_text(path, key), str(path), key)


def parse_table(text: str, name: str, key: str = "") -> Table:
    """Parse the text of a table; see `read_table`.

    Args:
        text: content of the file.
        name: name of the file, whose suffix selects the format.
        key: as in `read_text`.

    Raises:
        DataError: the text is empty, or a line has an unbalanced quote or more cells than the header.
    """
    first, _, rest = text.partition("\n")
    line, separator = 1, "\t"
    is_tsv = name.lower().endswith(".tsv")
    if not is_tsv:
        separator = _separator(first)
        if first.strip().lower().startswith("sep=") and len(first.strip()) == 5:
            line, text, separator = 2, rest, first.strip()[4]
    # Strict mode, because an unbalanced quote would otherwise silently join the following lines.
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=not is_tsv,
        quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL,
    )  # fmt: skip
    header: tuple[str, ...] = ()
    rows: list[Row] = []
    begins = line
    try:
        for cells in reader:
            if cells and not header:
                header = tuple(cell.strip() for cell in cells)
            elif cells:
                if len(cells) > len(header):
                    raise DataError(
                        f"{_prefix(key)}{name}, line {begins}: {len(cells)} cells, the header has {len(header)}. Put "
                        f"values that contain the separator {separator!r} in double quotes (CSV only)."
                    )
                missing = len(header) - len(cells)
                rows.append(Row(line=begins, cells=(*cells, *[""] * missing)))
            begins = line + reader.line_num
    except csv.Error as error:
        raise DataError(f"{_prefix(key)}{name}, line {begins}, cannot be read: {error}") from error
    if not header:
        raise DataError(f"{_prefix(key)}{name} is empty; expected a header with the names of its columns.")
    return Table(name=name, header=header, rows=tuple(rows))


def _prefix(key: str) -> str:
    return f"{key}: " if key else ""


def _separator(header: str) -> str:
    counts = Counter(character for character in header if character in _SEPARATORS)
    return max(_SEPARATORS, key=lambda character: counts[character])
