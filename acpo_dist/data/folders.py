"""List all files below a folder."""

import os
from pathlib import Path

from acpo_dist.core.errors import DataError


def files_below(folder: Path) -> list[Path]:
    """Files at every depth, sorted by path; links to folders are followed, and no folder is entered twice.

    Hidden files are left out; macOS archives contain a `._name.png` beside each image.

    Raises:
        DataError: a folder cannot be listed; it is named.
    """
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    # Real folders come before links, so that a file keeps its own path where it has one below `folder`.
    todo = [folder]
    while todo:
        todo = [link for start in todo for link in _walk(start, entered, found)]
    return sorted(found)


def _walk(start: Path, entered: set[tuple[int, int]], found: list[Path]) -> list[Path]:
    """Add the files below `start` and the folders that they lie in; links to folders are returned, in order."""
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
        "readable, or name the folders beside it one by one."
    ) from error
