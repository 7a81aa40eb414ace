"""Run one evaluation, from the plan to `evaluation.json`."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acpo_dist.core.errors import UsageError
from acpo_dist.core.files import replace_file
from acpo_dist.core.packages import installed_versions
from acpo_dist.core.ports import Advance
from acpo_dist.core.types import PromptGroup
from acpo_dist.data.encoded import EncodedImage
from acpo_dist.data.prompts import size_mix
from acpo_dist.evaluation.metrics.features import Extractor
from acpo_dist.evaluation.suites.backend import Backend
from acpo_dist.evaluation.suites.chunks import Chunk, drawn_chunks, found_chunks, judge_all, kept_chunks, split_chunks
from acpo_dist.evaluation.suites.denoising import held_out_denoising
from acpo_dist.evaluation.suites.drift import run_drift
from acpo_dist.evaluation.suites.judges import judge_facts
from acpo_dist.evaluation.suites.samples import REPORT, Sample, SampleLog
from acpo_dist.evaluation.suites.set_metrics import judge_metrics, set_metrics, total_missing
from acpo_dist.evaluation.suites.subject import ImageSubject, ModelSubject, settle
from acpo_dist.evaluation.suites.suite import Suite, sample_groups
from acpo_dist.tracking.console import Console
from acpo_dist.training.run_folder import git_commit

FORMAT = 1
_SOFTWARE = ("acpo-dist", "torch", "diffusers", "transformers", "peft", "pyiqa")

Subject = ModelSubject | ImageSubject


@dataclass(frozen=True, kw_only=True)
class Request:
    """Subjects, suite, judges and settings of an evaluation."""

    subject: Subject
    comparison: Subject | None = None
    suite: Suite | None = None
    """Prompts to sample; for existing images, the source of their categories."""
    sections: tuple[Any, ...]
    """Judges."""
    trained_on: frozenset[str] = frozenset()
    """Names of judges that were rewards of the run, whose scores are no independent evidence."""
    extractor: Extractor = field(repr=False)
    features: str
    """Name of the extractor, as given by the user."""
    samples_per_prompt: int = 1
    limit: int | None = None
    seed: int = 0
    drift: int = 0
    """Number of samples for the drift from the base model; 0 disables it."""
    image_column: str = "image"
    prompt_column: str = "prompt"

    @property
    def arms(self) -> dict[str, Subject]:
        """Subjects by arm."""
        return {"model": self.subject, **({"comparison": self.comparison} if self.comparison else {})}

    def plan(self) -> dict[str, Any]:
        """Return all settings that determine the metrics, and no others."""
        plan: dict[str, Any] = {
            "format": FORMAT,
            "limit": self.limit,
            "arms": {arm: subject.facts for arm, subject in self.arms.items()},
            "judges": {section.name: judge_facts(section) for section in self.sections},
        }
        if self.suite is not None:
            plan["suite"] = {
                "name": self.suite.name, "prompts": len(self.suite.prompts), "of": self.suite.total,
                "sha256": self.suite.sha256,
            }  # fmt: skip
        if isinstance(self.subject, ModelSubject):
            config = self.subject.config
            plan |= {
                "seed": self.seed, "samples_per_prompt": self.samples_per_prompt,
                "batch_size": config.rollout.batch_size, "sampler": config.sampler.model_dump(mode="json"),
            }  # fmt: skip
            if config.model.sizes:
                plan["image_size"] = config.model.model_dump(mode="json")["image_size"]
        else:
            plan |= {"image_column": self.image_column, "prompt_column": self.prompt_column}
        return plan


def evaluate(
    request: Request, backend: Backend, folder: Path, console: Console, *, resume: bool = False
) -> dict[str, Any]:
    """Sample the images, judge them, and compute the metrics.

    Args:
        request: what to evaluate.
        backend: provides workers and judges.
        folder: folder of this evaluation; results of an earlier call are verified and kept.
        console: progress output.
        resume: whether to continue the evaluation in `folder`.

    Returns:
        The content of `evaluation.json`.

    Raises:
        AcpoError: the input is invalid (before any work starts), or workers are lost; `resume` continues from there.
    """
    started = time.monotonic()
    _check_prompts(request)
    log = SampleLog(folder)
    plan = log.check(request.plan(), resume=resume)
    names = [section.name for section in request.sections]
    with backend.judges(request.sections) as judges:
        # Loading the judges before writing anything leaves no folder behind if one cannot be built.
        log.start(plan)
        if isinstance(request.subject, ModelSubject) and (damaged := log.verify(log.image_holds)):
            console.message(f"{damaged} images in {folder} are missing or changed, and are drawn again")
        before = len(log.rows)
        for arm, subject in request.arms.items():
            what = "draw and judge" if isinstance(subject, ModelSubject) else "judge"
            with (
                console.phase(f"{arm}: {what}", _total(request, subject)) as advance,
                _chunks(request, arm, subject, backend, log, names, advance) as chunks,
            ):
                judge_all(chunks, judges, log, advance, in_flight=backend.chunks_at_once - 1)
    log.finish(_order(request, log), names)
    report = _report(request, log, console)
    if request.drift and isinstance(request.subject, ModelSubject):
        with console.phase("drift from the base", None):
            groups = _groups(request)[: max(1, request.drift // request.samples_per_prompt)]
            report["drift"] = run_drift(request.subject, groups, backend)
    if isinstance(request.subject, ModelSubject) and request.subject.bundle is not None:
        with console.phase("denoising error", None):
            denoising = held_out_denoising(request.subject)
        if denoising is not None:
            report["denoising"] = denoising
    report["provenance"] = {
        **request.plan(), "schedule_ids": _schedules(log), "features": request.features, "software": _software(),
        "git_commit": git_commit(),
    }  # fmt: skip
    report["how"] = {
        "backend": backend.name, "seconds": round(time.monotonic() - started, 1), "kept_samples": before,
        "samples": len(log.rows),
    }  # fmt: skip
    replace_file(folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False).encode())
    return report


@contextmanager
def _chunks(
    request: Request, arm: str, subject: Subject, backend: Backend, log: SampleLog, names: Sequence[str],
    advance: Advance,
) -> Iterator[Iterator[list[Chunk]]]:  # fmt: skip
    """Yield all chunks of one arm to judge; workers only start if something has to be sampled."""
    if isinstance(subject, ImageSubject):
        categories = {entry.prompt: entry.category for entry in request.suite.prompts} if request.suite else {}
        yield found_chunks(arm, _images(request, subject), log, names, categories, advance)
        return
    assert request.suite is not None
    by_id = {entry.prompt_id: entry.category for entry in request.suite.prompts}
    kept, todo = split_chunks(arm, _groups(request), subject.config.rollout.batch_size, log)
    again = kept_chunks(arm, kept, log, names, advance)
    if not todo:
        yield again
        return
    # Only learners use late states: 1 is the minimum a worker keeps, and t_max must not reject few steps.
    sampler = subject.config.sampler.model_copy(update={"t_max": 1.0, "late_per_sample": 1})
    with backend.rollouts(subject.config.model_copy(update={"sampler": sampler})) as pool:
        settle(pool, subject)
        drawn = drawn_chunks(arm, todo, pool, log, names, by_id, at_once=backend.chunks_at_once)
        yield itertools.chain(again, drawn)


def _images(request: Request, subject: ImageSubject) -> Iterator[EncodedImage]:
    whole = len(subject.images)
    count = min(request.limit or whole, whole)
    return subject.images.read([index * whole // count for index in range(count)])


def _groups(request: Request) -> list[PromptGroup]:
    assert request.suite is not None
    # Both arms draw the sizes of the first model.
    mix = size_mix(request.subject.config) if isinstance(request.subject, ModelSubject) else None
    return sample_groups(request.suite, samples_per_prompt=request.samples_per_prompt, seed=request.seed, mix=mix)


def _order(request: Request, log: SampleLog) -> list[tuple[str, str]]:
    """Return the line order of the finished file: by arm, then by prompt."""
    if isinstance(request.subject, ModelSubject):
        plans = [plan.sample_id for group in _groups(request) for plan in group.samples]
        return [(arm, sample_id) for arm in request.arms for sample_id in plans]
    return [(arm, row.sample_id) for arm in request.arms for row, _ in _with_data(request, arm, log)]


def _report(request: Request, log: SampleLog, console: Console) -> dict[str, Any]:
    arms = {arm: [row for row in log.rows if row.arm == arm] for arm in request.arms}
    rows, others = arms["model"], arms.get("comparison", [])
    categories = [name for name in dict.fromkeys(row.category for row in rows) if name]
    with console.phase("metrics", None):
        judges = [
            {
                **judge_metrics(
                    section.name, judge_facts(section)["higher_is_better"], rows, others, categories=categories
                ),
                "role": "drove the update" if section.name in request.trained_on else "judge",
            }
            for section in request.sections
        ]
        other = _with_data(request, "comparison", log) if others else None
        sets = set_metrics(_with_data(request, "model", log), other, request.extractor)
    missing = total_missing(judges)
    failures = [
        {"arm": row.arm, "sample_id": row.sample_id, "image": row.image, "judge": name, "error": text}
        for row in log.rows
        for name, text in row.errors.items()
    ]
    return {"num_missing": missing, "failures": failures, "judges": judges, "sets": sets}


def _with_data(request: Request, arm: str, log: SampleLog) -> Iterator[tuple[Sample, bytes | None]]:
    """Yield the samples of an arm with their encoded images, one at a time."""
    subject = request.arms[arm]
    if isinstance(subject, ModelSubject):
        yield from ((row, log.read_image(row)) for row in log.rows if row.arm == arm)
        return
    for image in _images(request, subject):
        row = log.find(arm, image.key)
        if row is not None:
            yield row, image.data


def _schedules(log: SampleLog) -> dict[str, list[str]]:
    """Return the trajectories of each arm; more than one means that its parts were sampled inconsistently."""
    found = {row.arm: set[str]() for row in log.rows if row.schedule_id}
    for row in log.rows:
        if row.schedule_id:
            found[row.arm].add(row.schedule_id)
    return {arm: sorted(ids) for arm, ids in found.items()}


def _total(request: Request, subject: Subject) -> int:
    if isinstance(subject, ImageSubject):
        return min(request.limit or len(subject.images), len(subject.images))
    assert request.suite is not None
    return len(request.suite.prompts) * request.samples_per_prompt


def _check_prompts(request: Request) -> None:
    """Check that prompts exist if a judge reads them.

    Raises:
        UsageError: a judge reads prompts and there are none.
    """
    for section in request.sections:
        if not section.needs_prompts:
            continue
        for subject in request.arms.values():
            if isinstance(subject, ModelSubject):
                missing = not subject.conditional
            else:
                missing = not next(_images(request, subject)).prompt
            if missing:
                raise UsageError(
                    f"judge `{section.name}` compares images with their prompts, and {subject.source} has none. Omit "
                    "it, or give a parquet file with a column of prompts (--prompt-column)."
                )


def _software() -> dict[str, str]:
    return installed_versions(_SOFTWARE)
