"""JSON objects from files that others wrote."""

import json
from pathlib import Path
from typing import Any, cast

from acpo_dist.core.errors import AcpoError, ModelError, shorten


def json_object(text: str | bytes, where: str, failure: type[AcpoError] = ModelError) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: the content.
        where: file and line, for messages.
        failure: class of the error.

    Raises:
        AcpoError: `failure`; the text is no JSON, nested too deeply, or another value than an object.
    """
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise failure(f"{where} is no JSON: {shorten(str(error), 200)}") from error
    if not isinstance(value, dict):
        raise failure(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return cast("dict[str, Any]", value)


def read_object(path: Path, failure: type[AcpoError] = ModelError) -> dict[str, Any]:
    """Read the JSON object of a file.

    Args:
        path: the file.
        failure: class of the error.

    Raises:
        AcpoError: `failure`; the file is missing, cannot be read, or holds no JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise failure(f"{path} cannot be read: {error.strerror or error}.") from error
    return json_object(content, str(path), failure)
