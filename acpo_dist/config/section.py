"""Base of every configuration section, and fields that hold a plug-in's own section."""

from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from acpo_dist.core.errors import ConfigError
from acpo_dist.core.registry import nearest, resolve

RENAMED = {
    "guard.pictures": "guard.images",
    "learner.max_refused_steps": "learner.max_skipped_steps",
}
"""Keys of earlier versions and their present names; the old name fails and the message gives the new one."""
REMOVED = {"guard.recall_lost": "recall was never measured in training, so the rule had no effect"}
"""Keys of earlier versions that no longer exist, and why; a configuration that sets one fails with the reason."""


class Section(BaseModel):
    """Frozen, and loud about keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`rollout.batch_size: yes` would otherwise become 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and not _takes_truth(annotation):
            name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
            raise ValueError(f"expected {name}, found {value}")
        return value


def _takes_truth(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_truth(part) for part in get_args(annotation))


def plugin(kind: str, registry: dict[str, str]) -> Any:
    """Type of a field whose `type` key picks a class from `registry`; validated by that class's `Config`."""

    def build(value: object) -> object:
        if isinstance(value, Section):
            return value
        if not isinstance(value, dict) or "type" not in value:
            raise ValueError(
                f"expected a mapping with the key `type` (one of {', '.join(sorted(registry))}), found {value!r}"
            )
        try:
            config = getattr(resolve(kind, registry, str(value["type"])), "Config", None)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if not (isinstance(config, type) and issubclass(config, Section)):
            raise ValueError(f"`{value['type']}` is no {kind}: it has no `Config`, a subclass of `Section`")
        try:
            return config.model_validate(value)
        except ValidationError as error:
            raise ValueError(f"{kind} `{value['type']}`: {describe(error, config)}") from error

    return Annotated[SerializeAsAny[Section], BeforeValidator(build)]


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """All problems of a failed validation in our words, each with its dotted key."""
    problems = error.errors()
    # A list whose entries are wrong is also reported as too short, which is only a consequence.
    inner = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    return "; ".join(_describe_one(problem, model) for problem in problems if problem["loc"] not in inner)


def _describe_one(problem: Any, model: type[BaseModel]) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    found = problem["input"]
    if problem["type"] == "extra_forbidden":
        if key in RENAMED:
            return f"`{key}` is now `{RENAMED[key]}`: rename it (value {found!r})"
        if key in REMOVED:
            return f"`{key}` was removed: {REMOVED[key]}. Delete the key (value {found!r})"
        known = fields_at(model, path[:-1])
        prefix = ".".join(path[:-1])
        suggestion = nearest(path[-1], known)
        where = f" Known keys of `{prefix}`: " if prefix else " Known: "
        return f"unknown key `{key}` (value {found!r}).{suggestion}{where}{', '.join(known)}"
    if problem["type"] == "missing":
        return f"`{key}` is required and not set"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"`{key}`: {message}" if key else message
    return f"`{key}`: {message[0].lower()}{message[1:]}, found {found!r}"


def fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields of the section that a dotted path leads to."""
    for part in path:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
