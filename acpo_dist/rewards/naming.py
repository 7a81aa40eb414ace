"""Conversion of a metric name or YAML text to a validated configuration section."""

from typing import Any

from acpo_dist.config.plugins import MetricConfig
from acpo_dist.config.section import parse_section
from acpo_dist.config.yaml_text import read_yaml
from acpo_dist.core.errors import ConfigError, RewardConfigError
from acpo_dist.core.registry import REWARDS


def metric_section(text: str, option: str, **keys: Any) -> MetricConfig:
    """Return the section of one metric.

    Args:
        text: name from `acpo rewards list`, `pyiqa:NAME`, `module:Class`, or a section in YAML such as
            `{type: pick_score, weights: FOLDER}`.
        option: command line option of `text`, for messages.
        keys: further keys of the section.

    Raises:
        RewardConfigError: unknown metric, wrong key, or a metric that is unusable on this machine.
    """
    try:
        if text.startswith("{"):
            values = read_yaml(text)
        else:
            kind, _, rest = text.partition(":")
            values = {"type": "pyiqa", "metric": rest} if kind == "pyiqa" and rest else {"type": text}
        section = parse_section("reward", REWARDS, MetricConfig, values | keys)
    except ConfigError as error:
        raise RewardConfigError(f"{option} {text}: {error}") from error
    if reason := section.unusable():
        raise RewardConfigError(f"{option} {text}: {reason}")
    return section
