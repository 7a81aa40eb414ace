"""The card beside an export: where weights come from, what was measured, and how plain diffusers draws with them."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from acpo_dist.analysis.release.model_card import base_licence
from acpo_dist.config.schema import Config


def export_card(
    config: Config, lora: str | None, schedule: str | None, facts: Mapping[str, str], metrics: Mapping[str, float]
) -> str:
    """Markdown with a YAML head, as model hubs read it.

    Args:
        lora: name of the LoRA file; None for a merged pipeline.
        schedule: name of the trajectory's file, or None.
        facts: provenance, by name.
        figures: what was measured before these weights, by name.
    """
    licence, base = base_licence(config), base_name(config)
    head = {
        "library_name": "diffusers",
        "base_model": base,
        "tags": [*dict.fromkeys(["acpo", config.algorithm.type])],
    }
    if licence:
        head["license"] = licence
    stated = licence or "not stated by the base model's files; look it up there before you pass the model on"
    measured = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
            f"# {config.run.name}\n",
            f"`{base}`, tuned on no-reference image quality with acpo_dist and held near the base model.\n",
            f"## Use\n\n```python\n{_code(config, lora, schedule)}```\n",
            "## Provenance\n\n| what | value |\n| --- | --- |",
            *(f"| {name} | {value} |" for name, value in facts.items()),
            "\n## Measured before these weights\n\n| figure | value |\n| --- | --- |",
            measured or "| nothing recorded | |",
            f"\n## Licence\n\nThe base model's: {stated}. Tuning adds no right to it.\n",
        ]
    )


def base_name(config: Config) -> str:
    """A hub id, or a folder's own name: where it lies is nobody's business."""
    path = config.model.path
    return Path(path).name if Path(path).is_dir() else path


def _code(config: Config, lora: str | None, schedule: str | None) -> str:
    revision = getattr(config.model, "revision", None)
    pinned = f", revision={json.dumps(revision)}" if revision else ""
    opened = f'"{base_name(config)}"{pinned}' if lora else '"."'
    lines = ["from diffusers import DiffusionPipeline", "", f"pipeline = DiffusionPipeline.from_pretrained({opened})"]
    if lora:
        lines.append(f'pipeline.load_lora_weights(".", weight_name="{lora}")')
    if schedule is not None:
        # Euler is equal to DDIM on the same levels; with this spacing diffusers starts it from unit noise.
        lines = [
            "import json",
            "",
            lines[0].replace("import DiffusionPipeline", "import DiffusionPipeline, EulerDiscreteScheduler"),
            *lines[1:],
            "pipeline.scheduler = EulerDiscreteScheduler.from_config(",
            '    pipeline.scheduler.config, timestep_spacing="leading"',
            ")",
            f'with open("{schedule}") as schedule:',
            '    levels = json.load(schedule)["diffusers"]["EulerDiscreteScheduler"]',
            f"image = pipeline({', '.join(_asked(config))}, **levels).images[0]",
        ]
    return "\n".join([*lines, ""])


def _asked(config: Config) -> list[str]:
    """Arguments of an image as the run drew it."""
    size, negative = config.model.image_size, config.model.negative_prompt
    return [
        '"a prompt"',
        *([f"height={size}, width={size}"] if size else []),
        *([f"negative_prompt={json.dumps(negative)}"] if negative is not None else []),
    ]
