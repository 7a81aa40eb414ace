"""Base of every configuration section, and fields that hold a plug-in's own section."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from acpo_dist.core.errors import ConfigError, quoted
from acpo_dist.core.registry import Registry, nearest, resolve_section

_MOST = 3
"""Maximum number of problems in one message."""
RENAMED = {
    "guard.pictures": "guard.images",
    "learner.max_refused_steps": "learner.max_skipped_steps",
}
"""Keys of earlier versions and their present names; the old name fails and the message gives the new one."""
REMOVED = {
    "guard.recall_lost": "recall was never measured in training, so the rule had no effect",
    "vrg.guidance": "the error of the null branch was measured and not used",
}
"""Keys of earlier versions that no longer exist, and why; a configuration that sets one fails with the reason."""


class Section(BaseModel):
    """Frozen section that rejects unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject booleans for numbers: `rollout.batch_size: yes` would otherwise become 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and not _takes_truth(annotation):
            name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
            raise ValueError(f"expected {name}, found {value}")
        return value


def _takes_truth(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_truth(part) for part in get_args(annotation))


_S = TypeVar("_S", bound=Section)


def section_class(kind: str, registry: Registry, base: type[_S], name: str) -> type[_S]:
    """Return the section class of a plug-in, with its facts.

    Args:
        kind: name of the kind of plug-in, for messages.
        registry: registered plug-ins.
        base: required base class of the section.
        name: registered name, or `module:Class`.

    Raises:
        ConfigError: unknown name, import failure, or a class without a section.
    """
    found = resolve_section(kind, registry, name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"`{name}` is no {kind}: it has no `Config` that subclasses `{base.__name__}`")
    return found


def parse_section(kind: str, registry: Registry, base: type[_S], values: object) -> _S:
    """Validate the section of a plug-in from plain data with the key `type`.

    Raises:
        ConfigError: as in `section_class`, or a key is wrong; names the plug-in and the key.
    """
    if not isinstance(values, Mapping) or "type" not in values:
        raise ConfigError(
            f"expected a mapping with the key `type` (one of {', '.join(sorted(registry))}), found {quoted(values)}"
        )
    section = section_class(kind, registry, base, str(values["type"]))
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{kind} {quoted(values['type'])}: {describe(error, section)}") from error


@dataclass(frozen=True)
class PluginField:
    """Marks a field whose `type` key selects a plug-in, which validates the other keys."""

    kind: str
    registry: Registry
    base: type[Section]

    def build(self, value: object) -> object:
        """Return a validated section, from plain data or unchanged."""
        if isinstance(value, Section):
            return value
        try:
            return parse_section(self.kind, self.registry, self.base, value)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    def section_of(self, values: object) -> type[Section] | None:
        """Return the section class that the `type` in `values` names, or None."""
        try:
            return section_class(self.kind, self.registry, self.base, str(_type_of(values)))
        except ConfigError:
            return None


def _type_of(values: object) -> object:
    return values.get("type", "") if isinstance(values, Mapping) else ""


def plugin(kind: str, registry: Registry, base: type[Section]) -> Any:
    """Type of a field whose `type` key picks a plug-in from `registry`; validated by that plug-in's section."""
    field = PluginField(kind, registry, base)
    return Annotated[SerializeAsAny[base], BeforeValidator(field.build), field]


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """Describe the problems of a failed validation, each with its dotted key."""
    problems = error.errors()
    # A list with invalid entries is also reported as too short, which is only a consequence.
    inner = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    texts = [_describe_one(problem, model) for problem in problems if problem["loc"] not in inner]
    more = f"; and {len(texts) - _MOST} more" if len(texts) > _MOST else ""
    return "; ".join(texts[:_MOST]) + more


def _describe_one(problem: Any, model: type[BaseModel]) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    found = problem["input"]
    if problem["type"] == "extra_forbidden":
        if key in RENAMED:
            return f"`{key}` is now `{RENAMED[key]}`: rename it (value {quoted(found)})"
        if key in REMOVED:
            return f"`{key}` was removed: {REMOVED[key]}. Delete the key (value {quoted(found)})"
        known = fields_at(model, path[:-1])
        prefix = ".".join(path[:-1])
        suggestion = nearest(path[-1], known)
        where = f" Known keys of `{prefix}`: " if prefix else " Known: "
        return f"unknown key {quoted(key)} (value {quoted(found)}).{suggestion}{where}{', '.join(known)}"
    if problem["type"] == "missing":
        return f"`{key}` is required and not set"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"`{key}`: {message}" if key else message
    return f"`{key}`: {message[0].lower()}{message[1:]}, found {quoted(found)}"


def fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Return the field names of the section at a dotted path."""
    for part in path:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
