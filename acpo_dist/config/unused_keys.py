"""Keys that another key leaves without effect. A configuration that sets one is refused instead of run without it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import ConfigError, quoted

_TRUSTED = ("vrg.search=vrg or best", lambda config: config.vrg.search != "hso_grid")
# null switches the budget off, also in a configuration that sets keys of its controller.
_BUDGET = (
    "algorithm.anchor.budget",
    lambda config: config.algorithm.anchor.budget is not None or "budget" in config.algorithm.anchor.model_fields_set,
)
_CHECKPOINT = ("model.path naming a checkpoint file", lambda config: _is_checkpoint(config.model.path))


@dataclass(frozen=True)
class Rule:
    """A key, and when it has an effect."""

    key: str
    """Dotted key."""
    needs: str
    """Setting with which the key has an effect, for the message."""
    is_used: Callable[[Any], bool]
    """Configuration -> whether the key has an effect."""


RULES = (
    Rule(
        "sampler.guidance_rescale", "sampler.guidance_scale above 1", lambda config: config.sampler.guidance_scale > 1
    ),
    Rule(
        "sampler.merge_adapters", "model.tuning.method=lora",
        lambda config: getattr(getattr(config.model, "tuning", None), "method", "lora") == "lora",
    ),
    Rule("sampler.k_max", "sampler.t_max=null", lambda config: config.sampler.t_max is None),
    # 0 switches the anchor off, also in a configuration that sets `start`.
    Rule(
        "algorithm.anchor.start", "algorithm.anchor.weight=auto",
        lambda config: config.algorithm.anchor.weight in ("auto", 0),
    ),
    Rule("algorithm.anchor.rate", *_BUDGET),
    Rule("algorithm.anchor.headroom", *_BUDGET),
    Rule(
        "algorithm.max_gradient_steps", "algorithm.gradient_steps=random",
        lambda config: _of(config, "gradient_steps", "random") == "random",
    ),
    Rule(
        "algorithm.guidance", "algorithm.gradient_steps=estimate and sampler.guidance_scale above 1",
        lambda config: _of(config, "gradient_steps", "estimate") == "estimate" and _is_guided(config),
    ),
    Rule(
        "algorithm.target_quantile", "algorithm.shape=hinge or softplus",
        lambda config: _of(config, "shape", None) != "identity",
    ),
    Rule("algorithm.min_snr_gamma", "algorithm.space=eps", lambda config: _of(config, "space", "eps") == "eps"),
    Rule("vrg.trust", *_TRUSTED),
    Rule("vrg.halvings", *_TRUSTED),
    Rule("vrg.min_gain", *_TRUSTED),
    Rule("model.prediction_type", *_CHECKPOINT),
    Rule("model.config", *_CHECKPOINT),
    Rule("model.tuning.anchor", "model.tuning.init", lambda config: config.model.tuning.init is not None),
    Rule("data.flip", "data.path", lambda config: config.data.path is not None),
    Rule("data.held_out", "data.path", lambda config: config.data.path is not None),
    Rule("learner.lr_decay_type", "learner.lr_decay_ratio above 0", lambda config: config.learner.lr_decay_ratio > 0),
)  # fmt: skip


def check_unused(config: Config) -> None:
    """Check that no key is set that the rest of the configuration leaves without effect.

    Raises:
        ConfigError: names the key, its value, and the setting with which it has an effect.
    """
    for rule in RULES:
        *path, name = rule.key.split(".")
        section: Any = config
        for part in path:
            section = getattr(section, part, None)
        # Plug-ins have their own keys.
        field = type(section).model_fields.get(name) if section is not None else None
        if field is None or getattr(section, name) == field.default or rule.is_used(config):
            continue
        raise ConfigError(
            f"{rule.key} is {quoted(getattr(section, name))}, which has an effect only with {rule.needs}. Set that, "
            f"or {rule.key}={_text(field.default)}."
        )


def _text(value: object) -> str:
    """Return a default as it is written in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _of(config: Config, key: str, absent: object) -> Any:
    return getattr(config.algorithm, key, absent)


def _is_guided(config: Config) -> bool:
    return config.sampler.guidance_for(conditional=config.model.conditional) > 1


def _is_checkpoint(path: str) -> bool:
    return path.endswith((".safetensors", ".ckpt"))
