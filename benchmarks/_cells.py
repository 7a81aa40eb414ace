"""Results of a study in a file of JSON lines, so that a study that is started again continues."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Cells:
    """Results by key. A key is measured once and then read from the file."""

    def __init__(self, path: Path) -> None:
        """Read the existing results; a last line that was cut short is dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._found: dict[str, Any] = {}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole != lines:
            path.write_text("".join(whole))
        for line in whole:
            row = json.loads(line)
            self._found[row["key"]] = row["value"]

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the result of `key`; measure and store it if there is none."""
        if key not in self._found:
            self._found[key] = measure()
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "value": self._found[key]}) + "\n")
        return self._found[key]

    def of(self, kind: str) -> dict[str, Any]:
        """Return the results whose key starts with `kind/`, without that prefix."""
        return {key[len(kind) + 1 :]: value for key, value in self._found.items() if key.startswith(f"{kind}/")}
