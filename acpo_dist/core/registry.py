"""Registries of the three kinds of plug-ins; a plug-in is imported only when a configuration names it."""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from acpo_dist.core.errors import ConfigError, quoted, shorten


class Plugin(NamedTuple):
    """Import paths of a plug-in."""

    target: str
    """`module:Class` of the implementation."""
    section: str = ""
    """`module:Class` of its configuration section, in a module that does not import torch. If empty, `Config` of the
    implementation is used, which is then imported to check a configuration."""


Registry = Mapping[str, Plugin]


def _ours(target: str, section: str) -> Plugin:
    """Return a plug-in of this package; both paths are relative to `acpo_dist`."""
    return Plugin(f"acpo_dist.{target}", f"acpo_dist.{section}")


REWARDS: dict[str, Plugin] = {
    "two_stream": _ours("rewards.metrics:TwoStreamMetric", "rewards.config:TwoStreamConfig"),
    "strided_judge": _ours("rewards.metrics:StridedJudgeMetric", "rewards.config:StridedJudgeConfig"),
    "sharpness": _ours("rewards.statistics:Sharpness", "rewards.config:SharpnessConfig"),
    "colourfulness": _ours("rewards.statistics:Colourfulness", "rewards.config:ColourfulnessConfig"),
    "saturation": _ours("rewards.statistics:Saturation", "rewards.config:SaturationConfig"),
    "edge_density": _ours("rewards.statistics:EdgeDensity", "rewards.config:EdgeDensityConfig"),
    "soft_edge_density": _ours("rewards.statistics:SoftEdgeDensity", "rewards.config:SoftEdgeDensityConfig"),
    "colour_entropy": _ours("rewards.statistics:ColourEntropy", "rewards.config:ColourEntropyConfig"),
    "soft_colour_entropy": _ours("rewards.statistics:SoftColourEntropy", "rewards.config:SoftColourEntropyConfig"),
    "clip_score": _ours("rewards.clip_metrics:ClipScore", "rewards.config:ClipScoreConfig"),
    "pick_score": _ours("rewards.clip_metrics:PickScore", "rewards.config:PickScoreConfig"),
    "aesthetic": _ours("rewards.clip_metrics:Aesthetic", "rewards.config:AestheticConfig"),
    "ipce": _ours("rewards.ipce:Ipce", "rewards.config:IpceConfig"),
    "latent_critic": _ours("rewards.latent_critic:LatentCritic", "rewards.critic_config:LatentCriticConfig"),
    "pyiqa": _ours("rewards.pyiqa_metric:PyiqaMetric", "rewards.config:PyiqaConfig"),
}
MODELS: dict[str, Plugin] = {
    "sdxl": _ours("models.sdxl:SdxlFamily", "models.config:SdxlConfig"),
    "sd3": _ours("models.sd3:Sd3Family", "models.config:Sd3Config"),
    "zimage": _ours("models.zimage:ZImageFamily", "models.config:ZImageConfig"),
    "flux2_klein": _ours("models.flux2:Flux2KleinFamily", "models.config:Flux2KleinConfig"),
    "sd15": _ours("models.sd15:Sd15Family", "models.config:Sd15Config"),
    "ddpm": _ours("models.ddpm:DdpmFamily", "models.config:DdpmConfig"),
}
ALGORITHMS: dict[str, Plugin] = {
    "acpo": _ours("algorithms.acpo:Acpo", "algorithms.config:AcpoConfig"),
    "draft": _ours("algorithms.acpo:Draft", "algorithms.config:DraftConfig"),
    "refl": _ours("algorithms.acpo:Refl", "algorithms.config:ReflConfig"),
    "nft": _ours("algorithms.denoising:Nft", "algorithms.config:NftConfig"),
    "crd": _ours("algorithms.centered:Crd", "algorithms.config:CrdConfig"),
    "rwr": _ours("algorithms.denoising:Rwr", "algorithms.config:RwrConfig"),
    "ddpo": _ours("algorithms.ddpo:Ddpo", "algorithms.config:DdpoConfig"),
    "dpo": _ours("algorithms.preference:Dpo", "algorithms.config:DpoConfig"),
    "cpo": _ours("algorithms.preference:Cpo", "algorithms.config:CpoConfig"),
    "sft": _ours("algorithms.preference:Sft", "algorithms.config:SftConfig"),
}


def nearest(word: str, known: list[str]) -> str:
    """Return text that suggests the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean `{close[0]}`?" if close else ""


def resolve(kind: str, registry: Registry, name: str) -> type[Any]:
    """Return the class of a registered name or of a user's `module:Class`.

    Raises:
        ConfigError: the name is unknown, or the module or class cannot be imported.
    """
    return _import(kind, name, _find(kind, registry, name).target)


def resolve_section(kind: str, registry: Registry, name: str) -> Any:
    """Return the configuration section of a name, or None if the implementation has no `Config`.

    The implementation is imported only if its entry names no section.

    Raises:
        ConfigError: the name is unknown, or the module or class cannot be imported.
    """
    plugin = _find(kind, registry, name)
    if plugin.section:
        return _import(kind, name, plugin.section)
    return getattr(_import(kind, name, plugin.target), "Config", None)


def _find(kind: str, registry: Registry, name: str) -> Plugin:
    plugin = registry.get(name, Plugin(name))
    if ":" not in plugin.target:
        known = ", ".join(sorted(registry))
        raise ConfigError(
            f"unknown {kind} {quoted(name)}.{nearest(name, list(registry))} Known: {known}; or `module:Class` of "
            "your own."
        )
    return plugin


def _import(kind: str, name: str, target: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    # A user's module may raise any exception, or exit the process, on import.
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{kind} {quoted(name)} cannot be imported from {quoted(target)}: {shorten(str(error))}"
        ) from error
