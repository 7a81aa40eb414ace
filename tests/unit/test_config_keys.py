"""Every key of every section has a description."""

import pytest

from acpo_dist.config.schema import Config
from acpo_dist.config.section import Section
from acpo_dist.core.registry import ALGORITHMS, MODELS, REWARDS, resolve_section


def sections():
    """Return all section classes of the schema and of the plug-ins."""
    waiting: list[type[Section]] = [Config]
    for registry in (ALGORITHMS, MODELS, REWARDS):
        waiting += [resolve_section("plug-in", registry, name) for name in registry]
    seen: list[type[Section]] = []
    while waiting:
        section = waiting.pop()
        if section in seen:
            continue
        seen.append(section)
        for field in section.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                waiting.append(field.annotation)
    return sorted(seen, key=lambda section: section.__name__)


def _is_described(section: type[Section], name: str) -> bool:
    """Return whether a key has a description: its own, inherited, or that of its section."""
    annotation = section.model_fields[name].annotation
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return bool(annotation.__doc__)
    parents = [parent for parent in section.__mro__ if issubclass(parent, Section) and name in parent.model_fields]
    return any(parent.model_fields[name].description for parent in parents)


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_key_has_a_description(section):
    bare = [name for name in section.model_fields if name != "type" and not _is_described(section, name)]
    assert section is Config or bare == []
