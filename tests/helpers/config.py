"""The smallest configuration that loads, and the message of its refusal."""

from pathlib import Path

import pytest
import yaml

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import ConfigError

PLUGINS = "tests.helpers.plugins"
SMALLEST = {
    "model": {"type": f"{PLUGINS}:Captioned"},
    "rewards": {"train": [{"type": f"{PLUGINS}:Smooth"}]},
    "algorithm": {"type": f"{PLUGINS}:NeedsGradients"},
}


def write(path: Path, content: dict | str) -> Path:
    """Write text, or data as YAML."""
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def refusal(source, *overrides: str, kind: type[Exception] = ConfigError) -> str:
    """Return the message with which the configuration is refused."""
    with pytest.raises(kind) as caught:
        load_config(source, overrides)
    return str(caught.value)
