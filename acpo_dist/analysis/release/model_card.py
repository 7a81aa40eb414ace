"""The model card beside an export or a promoted model: origin, tuning, measurements, licences and how to load it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from acpo_dist.config.schema import Config
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.sizes import main_size
from acpo_dist.evaluation.suites.set_metrics import counts_of, reasons_of
from acpo_dist.models.loading import CHECKPOINT_SUFFIXES, resolve_path
from acpo_dist.rewards.listing import reward_listing

_SHOWN = re.compile(r"(reward|judge)/.+/mean|drift/(rms|budget)|gain/.+")
_UNKNOWN = "not stated in the base model's files; check it before you distribute the model"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Contents of a model card."""

    config: Config
    name: str
    iteration: int
    metrics: Mapping[str, float]
    """Metrics of the iteration before the checkpoint."""
    provenance: Mapping[str, str]
    """Run, checksum and code version, by name."""
    guard: str
    """The guard's report, in Markdown."""
    code: str
    """Python code that generates an image with plain diffusers; see `loading_code`."""
    gains: Mapping[str, float] = field(default_factory=dict)
    """Gains of the run's last weights; empty for a card of other weights."""
    evaluations: Sequence[Mapping[str, Any]] = ()
    objections: Sequence[str] = ()
    """Reasons why the guard was not clean, if the run was promoted by force."""


def model_card(facts: CardFacts) -> str:
    """Return the card as Markdown with the YAML header of model hubs."""
    base = base_name(facts.config)
    licence = base_licence(facts.config)
    head = {
        "library_name": "diffusers", "base_model": base, "tags": ["acpo-dist", facts.config.algorithm.type],
        **({"license": licence} if licence else {}),
    }  # fmt: skip
    reasons = "\n".join(f"> - {text}" for text in facts.objections)
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {facts.name}",
        f"`{base}`, tuned with `{facts.config.algorithm.type}` on {_rewards(facts.config)} for {facts.iteration} "
        "iterations with acpo_dist. The update used the rewards only; the judges are held out.",
        *([f"> **Promoted by force.** The guard was not clean:\n{reasons}"] if reasons else []),
        f"## Use\n\n```python\n{facts.code}```",
        f"## Tuning\n\n{_table(('what', 'value'), _tuning(facts))}",
        f"## Measured\n\n{_measured(facts)}",
        f"## Guard\n\n{facts.guard}",
        f"## Licences\n\n{_table(('part', 'licence'), _licences(facts.config, licence))}",
        "Tuning grants no further rights.",
        f"## Provenance\n\n{_table(('what', 'value'), list(facts.provenance.items()))}",
    ]
    return "\n\n".join(parts) + "\n"


def loading_code(config: Config, *, file: str | None = None, whole: bool = False, schedule: str | None = None) -> str:
    """Return Python code that generates one image with plain diffusers from the folder of the card.

    Args:
        config: configuration of the run.
        file: name of the LoRA file or of the checkpoint file in the folder; None for a pipeline folder.
        whole: whether `file` is a checkpoint file.
        schedule: name of the trajectory file in the folder; None for evenly spaced steps.
    """
    imports = []
    if file and whole:
        kind = resolve("model", MODELS, config.model.type).pipeline.__name__
        lines = [f'pipeline = {kind}.from_single_file("{file}")']
    elif file:
        kind, revision, base = "DiffusionPipeline", getattr(config.model, "revision", None), base_name(config)
        opened = json.dumps(base)
        if base.startswith("toy-"):
            imports, opened = (
                ["from acpo_dist.models.loading import CHECKPOINT_SUFFIXES, resolve_path"],
                f"resolve_path({opened})",
            )
        opened += f", revision={json.dumps(revision)}" if revision else ""
        loader = "from_pretrained"
        if base.endswith(CHECKPOINT_SUFFIXES):
            kind, loader = resolve("model", MODELS, config.model.type).pipeline.__name__, "from_single_file"
        lines = [
            f"pipeline = {kind}.{loader}({opened})", f'pipeline.load_lora_weights(".", weight_name="{file}")'
        ]  # fmt: skip
    else:
        kind = "DiffusionPipeline"
        lines = ['pipeline = DiffusionPipeline.from_pretrained(".")']
    if schedule:
        # Euler equals DDIM on the same levels; with this spacing diffusers starts it from unit noise.
        lines += [
            "pipeline.scheduler = EulerDiscreteScheduler.from_config(",
            '    pipeline.scheduler.config, timestep_spacing="leading"',
            ")",
            f'with open("{schedule}") as schedule:',
            '    levels = json.load(schedule)["diffusers"]["EulerDiscreteScheduler"]',
        ]
    lines += [f"image = pipeline({', '.join(_arguments(config, schedule))}).images[0]", 'image.save("image.png")', ""]
    names = ", ".join(sorted([kind, *(["EulerDiscreteScheduler"] if schedule else [])]))
    head = [*(["import json", ""] if schedule else []), *imports, f"from diffusers import {names}", ""]
    return "\n".join([*head, *lines])


def _arguments(config: Config, schedule: str | None) -> list[str]:
    """Return arguments of the pipeline's call that reproduce the run's sampling."""
    steps = config.sampler.num_steps
    if config.data.prompts == "none":
        return [f"num_inference_steps={max(steps, 50)}"]
    size, negative = main_size(config.model.sizes), config.model.negative_prompt
    return [
        json.dumps(_example(config)),
        *([f"height={size[1]}, width={size[0]}"] if size else []),
        *([f"negative_prompt={json.dumps(negative)}"] if negative is not None else []),
        f"guidance_scale={config.sampler.guidance_scale:g}",
        *([f"guidance_rescale={rescale:g}"] if (rescale := config.sampler.guidance_rescale) > 0 else []),
        "**levels" if schedule else f"num_inference_steps={steps}",
    ]


def base_name(config: Config) -> str:
    """Return a hub id, or the name of a folder without its path, which must not be published on a card."""
    path = config.model.path
    return Path(path).name if Path(path).exists() else path


def base_licence(config: Config) -> str | None:
    """Return the licence stated on the base model's own card, or None."""
    path = Path(resolve_path(config.model.path)) / "README.md"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return None
    try:
        head = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError:
        return None
    found = head.get("license") if isinstance(head, dict) else None
    return str(found) if found else None


def _tuning(facts: CardFacts) -> list[tuple[str, object]]:
    config = facts.config
    anchor = getattr(config.algorithm, "anchor", None)
    rows: list[tuple[str, object]] = [
        ("base model", base_name(config)),
        *[(f"LoRA merged into it ({lora.scale:g})", lora.path.name) for lora in getattr(config.model, "loras", ())],
        ("prompts", "none (unconditional)" if config.data.prompts == "none" else Path(config.data.prompts).name),
        ("rewards (drove the update)", _rewards(config)),
        ("judges (held out)", ", ".join(f"`{entry.name}`" for entry in config.rewards.judges) or "none"),
        (
            "tuned weights",
            config.model.tuning.method
            + (f", rank {config.model.tuning.rank}" if config.model.tuning.method == "lora" else ""),
        ),
        (
            "sampler",
            f"{config.sampler.solver}, {config.sampler.num_steps} steps, guidance {config.sampler.guidance_scale:g}",
        ),
        ("iterations", f"{facts.iteration} of {config.run.iterations}"),
        ("samples per iteration", config.rollout.prompts_per_iteration * config.rollout.samples_per_prompt),
        ("seed", config.run.seed),
    ]
    if anchor is not None and anchor.budget is not None:
        rows.append(("drift budget (rms)", f"{anchor.budget:g}"))
    return rows


def _measured(facts: CardFacts) -> str:
    rows = [(name, f"{value:.4g}") for name, value in facts.metrics.items() if _SHOWN.fullmatch(name)]
    text = f"In the last iteration before these weights:\n\n{_table(('metric', 'value'), rows)}"
    if facts.gains:
        gains = [(name, f"{value:+.2f}") for name, value in facts.gains.items()]
        text += (
            "\n\nGain on the calibration prompts and seeds, in standard deviations of the base model's samples:\n\n"
            + _table(("metric", "gain"), gains)
        )
    for report in facts.evaluations:
        text += f"\n\n{_evaluation(report)}"
    return text


def _evaluation(report: Mapping[str, Any]) -> str:
    suite = report["provenance"].get("suite")
    on = f"suite `{suite['name']}`, {suite['prompts']} of {suite['of']} prompts" if suite else "images"
    rows = []
    for one in report["judges"]:
        paired = one.get("paired", {})
        rows.append(
            (
                f"{one['judge']}{'' if one['role'] == 'judge' else ' (drove the update)'}", _mean(one["model"]),
                _mean(one["comparison"]) if "comparison" in one else "-",
                _interval(paired["difference"]) if "difference" in paired else "-",
                _interval(paired["win_rate"]) if "win_rate" in paired else "-",
                ", ".join(counts_of(one)),
            )
        )  # fmt: skip
    against = Path(report["provenance"]["arms"].get("comparison", {}).get("source", "nothing")).name
    head = ("judge", "model", "comparison", "difference", "win rate", "n")
    text = f"Evaluation on {on}, against {against} (95 % intervals over prompts):\n\n{_table(head, rows)}"
    return "\n\n".join([text, *reasons_of({one["judge"]: one for one in report["judges"]})])


def _licences(config: Config, base: str | None) -> list[tuple[str, object]]:
    known = {(row["type"], row["name"]): row["licence"] for row in reward_listing()}
    rows: list[tuple[str, object]] = [("base model", base or _UNKNOWN)]
    for entry in (*config.rewards.train, *config.rewards.judges):
        name = f"pyiqa:{entry.metric}" if entry.type == "pyiqa" else entry.type
        rows.append((f"metric `{entry.name}`", known.get((entry.type, name), "not known")))
    return rows


def _rewards(config: Config) -> str:
    return ", ".join(f"`{entry.name}`" for entry in config.rewards.train)


def _example(config: Config) -> str:
    return "a red circle on a white background" if config.data.prompts == "toy" else "a photo of a lighthouse at dawn"


def _mean(one: Mapping[str, Any]) -> str:
    if one["mean"] is None:
        return "-"
    return f"{one['mean']:.4g}" + (f" [{one['low']:.4g}, {one['high']:.4g}]" if one["low"] is not None else "")


def _interval(one: Mapping[str, Any]) -> str:
    return f"{one['value']:.3g} [{one['low']:.3g}, {one['high']:.3g}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
