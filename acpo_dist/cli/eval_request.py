"""Convert the options of `acpo eval` to a request."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acpo_dist.config.load import load_config
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import UsageError
from acpo_dist.data.captions import CAPTION_COLUMNS
from acpo_dist.data.images import holds_images
from acpo_dist.evaluation.suites.evaluate import Request
from acpo_dist.evaluation.suites.judges import check_names, judge_sections
from acpo_dist.evaluation.suites.set_metrics import open_extractor
from acpo_dist.evaluation.suites.subject import (
    BASE,
    ImageSubject,
    ModelSubject,
    open_comparison,
    open_images,
    open_model,
)
from acpo_dist.evaluation.suites.suite import UNCONDITIONAL, load_suite
from acpo_dist.models.loading import CHECKPOINT_SUFFIXES, resolve_path
from acpo_dist.training.run_folder import RESOLVED


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    source: str
    overrides: tuple[str, ...]
    suite: str | None
    judges: tuple[str, ...]
    compare: str | None
    checkpoint: str
    samples_per_prompt: int
    limit: int | None
    seed: int
    features: str
    drift: int
    prompt_column: str
    category_column: str
    image_column: str


def request_of(options: Options) -> tuple[Request, Config]:
    """Return the request, and the configuration that selects the backend.

    Raises:
        UsageError: a source does not exist, or an option does not match the others.
    """
    extractor = open_extractor(options.features)
    common: dict[str, Any] = {
        "extractor": extractor, "features": options.features, "limit": options.limit,
        "prompt_column": options.prompt_column, "image_column": options.image_column,
    }  # fmt: skip
    if _is_images(options.source):
        return _images(options, common)
    path = Path(options.source)
    if path.is_dir() and not _is_model(path):
        raise UsageError(
            f"{options.source} holds no image, and is neither a run (no {RESOLVED}) nor a "
            "pipeline (no model_index.json)."
        )
    if options.suite is None:
        raise UsageError(
            "a model needs --suite: drawbench, parti, toy, none (unconditional), or a .txt, .csv, .tsv or .parquet "
            "file."
        )
    suite = load_suite(
        options.suite, limit=options.limit, prompt_column=options.prompt_column, category_column=options.category_column
    )
    subject = open_model(
        options.source, options.overrides, checkpoint=options.checkpoint, prompted=suite.name != UNCONDITIONAL
    )
    sections, trained_on = _judges(options, subject)
    if options.compare is not None and _is_images(options.compare):
        raise UsageError(
            f"--compare {options.compare}: images can only be compared with images, and {options.source} is a model."
        )
    comparison = (
        open_comparison(options.compare, subject, checkpoint=options.checkpoint)
        if options.compare is not None
        else None
    )
    request = Request(
        subject=subject, comparison=comparison, suite=suite, sections=sections, trained_on=trained_on,
        samples_per_prompt=options.samples_per_prompt, seed=options.seed,
        drift=options.drift if subject.bundle is not None and options.compare == BASE else 0, **common,
    )  # fmt: skip
    return request, subject.config


def _images(options: Options, common: dict[str, Any]) -> tuple[Request, Config]:
    """Build the request for existing images, which accepts no option of a model."""
    if options.samples_per_prompt != 1:
        raise UsageError(f"{options.source} holds images, which are not sampled: omit --samples-per-prompt.")
    if options.compare is not None and not _is_images(options.compare):
        raise UsageError(f"--compare {options.compare}: {options.source} holds images, so it must also hold images.")
    if not options.judges:
        raise UsageError("images need --judges; `acpo rewards list` shows all judges.")
    suite = None
    if options.suite is not None:
        suite = load_suite(options.suite, prompt_column=options.prompt_column, category_column=options.category_column)
    request = Request(
        subject=_images_of(options, options.source), suite=suite, sections=judge_sections(options.judges),
        comparison=_images_of(options, options.compare) if options.compare is not None else None, **common,
    )  # fmt: skip
    # Only its placement is used, and only on Ray: no model is loaded.
    return request, load_config("toy_sdxl", options.overrides)


def _judges(options: Options, subject: ModelSubject) -> tuple[tuple[Any, ...], frozenset[str]]:
    """Return the given judges, or else those of the run, and the names of those that were its rewards."""
    rewards = subject.config.rewards
    trained_on = frozenset(entry.name for entry in rewards.train) if subject.run else frozenset[str]()
    if options.judges:
        return judge_sections(options.judges), trained_on
    if subject.run is None:
        raise UsageError(f"{options.source} is no run with judges of its own: set --judges (`acpo rewards list`).")
    sections = (*rewards.judges, *(entry for entry in rewards.train if entry.space == "image"))
    check_names(sections)
    return sections, trained_on


def _images_of(options: Options, source: str) -> ImageSubject:
    columns = dict.fromkeys((options.prompt_column, *CAPTION_COLUMNS))
    return open_images(source, image_column=options.image_column, caption_columns=tuple(columns))


def _is_model(path: Path) -> bool:
    checkpoint = path.suffix in CHECKPOINT_SUFFIXES and path.is_file()
    return checkpoint or (path / RESOLVED).is_file() or (path / "model_index.json").is_file()


def _is_images(source: str) -> bool:
    path = Path(source)
    if _is_model(path):
        return False
    if source.startswith("toy-") and not path.exists():
        resolve_path(source)
        return False
    return holds_images(path)
