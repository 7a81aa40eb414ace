"""The three plug-in axes by name. Strings only: nothing is imported until a configuration asks for it."""

import difflib
import importlib
from typing import Any

from acpo_dist.core.errors import ConfigError

REWARDS: dict[str, str] = {
    "two_stream": "acpo_dist.rewards.metrics:TwoStreamMetric",
    "strided_judge": "acpo_dist.rewards.metrics:StridedJudgeMetric",
    "sharpness": "acpo_dist.rewards.statistics:Sharpness",
    "colourfulness": "acpo_dist.rewards.statistics:Colourfulness",
    "saturation": "acpo_dist.rewards.statistics:Saturation",
    "edge_density": "acpo_dist.rewards.statistics:EdgeDensity",
    "soft_edge_density": "acpo_dist.rewards.statistics:SoftEdgeDensity",
    "colour_entropy": "acpo_dist.rewards.statistics:ColourEntropy",
    "soft_colour_entropy": "acpo_dist.rewards.statistics:SoftColourEntropy",
    "clip_score": "acpo_dist.rewards.clip_metrics:ClipScore",
    "pick_score": "acpo_dist.rewards.clip_metrics:PickScore",
    "aesthetic": "acpo_dist.rewards.clip_metrics:Aesthetic",
    "ipce": "acpo_dist.rewards.ipce:Ipce",
    "pyiqa": "acpo_dist.rewards.pyiqa_metric:PyiqaMetric",
}
MODELS: dict[str, str] = {
    "sdxl": "acpo_dist.models.sdxl:SdxlFamily",
    "sd15": "acpo_dist.models.sd15:Sd15Family",
    "ddpm": "acpo_dist.models.ddpm:DdpmFamily",
}
ALGORITHMS: dict[str, str] = {
    "acpo": "acpo_dist.algorithms.acpo:Acpo",
    "draft": "acpo_dist.algorithms.acpo:Draft",
    "refl": "acpo_dist.algorithms.acpo:Refl",
    "nft": "acpo_dist.algorithms.denoising:Nft",
    "rwr": "acpo_dist.algorithms.denoising:Rwr",
    "ddpo": "acpo_dist.algorithms.ddpo:Ddpo",
    "dpo": "acpo_dist.algorithms.preference:Dpo",
    "cpo": "acpo_dist.algorithms.preference:Cpo",
    "sft": "acpo_dist.algorithms.preference:Sft",
}


def nearest(word: str, known: list[str]) -> str:
    """Text that names the closest known word, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean `{close[0]}`?" if close else ""


def resolve(kind: str, registry: dict[str, str], name: str) -> type[Any]:
    """The class behind a registered name, or behind a `module:Class` that the user wrote.

    Raises:
        ConfigError: unknown name, or the module or class cannot be imported.
    """
    target = registry.get(name, name)
    module, separator, attribute = target.partition(":")
    if not separator:
        known = ", ".join(sorted(registry))
        raise ConfigError(
            f"unknown {kind} `{name}`.{nearest(name, list(registry))} Known: {known}; or `module:Class` of your own."
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{kind} `{name}` cannot be imported from `{target}`: {error}") from error
