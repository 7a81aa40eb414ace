"""List all files below a folder."""

import os
from pathlib import Path

from acpo_dist.core.errors import DataError


def files_below(folder: Path) -> list[Path]:
    """List files at every depth. Links to folders are followed, and each folder is visited once.

    Hidden files are skipped; macOS archives contain a `._name.png` beside each image.

    Args:
        folder: folder to search.

    Returns:
        Files, sorted by path.

    Raises:
        DataError: a folder cannot be listed.
    """
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    # Real folders are visited before links, so that a file below `folder` is listed under its real path if it has one.
    todo = [folder]
    while todo:
        todo = [link for start in todo for link in _walk(start, entered, found)]
    return sorted(found)


def _walk(start: Path, entered: set[tuple[int, int]], found: list[Path]) -> list[Path]:
    """Append the files below `start` to `found`, and return the links to folders, in order."""
    links: list[Path] = []
    for place, folders, files in os.walk(start, onerror=_refuse):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        links += [Path(place, name) for name in sorted(folders) if os.path.islink(Path(place, name))]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return links


def _refuse(error: OSError) -> None:
    raise DataError(
        f"{error.filename} cannot be listed ({error.strerror}), so images below it would be missed. Make it "
        "readable, or name the other folders one by one."
    ) from error
