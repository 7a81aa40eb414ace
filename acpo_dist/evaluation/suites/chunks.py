"""Chunks of images to judge: newly sampled, kept from an earlier call, or read from files."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from acpo_dist.core.errors import DataError
from acpo_dist.core.ports import Advance, RolloutPool
from acpo_dist.core.types import PromptGroup, SamplePlan
from acpo_dist.data.decoding import decode_named, encode_png
from acpo_dist.data.encoded import EncodedImage, digest
from acpo_dist.evaluation.suites.judges import CHUNK, JudgePool, PendingJudgement
from acpo_dist.evaluation.suites.samples import Sample, SampleLog
from acpo_dist.workers.rollout.chunks import chunks_of


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Samples that are judged together. The split does not depend on the number of workers."""

    rows: tuple[Sample, ...]
    images: tuple[Tensor, ...]
    """uint8 (3, H, W), one per row."""
    judges: tuple[str, ...]
    """Names of the judges that score the chunk."""


def judge_all(
    batches: Iterable[Sequence[Chunk]], pool: JudgePool, log: SampleLog, advance: Advance, *, in_flight: int
) -> None:
    """Judge all chunks and write their samples.

    Args:
        batches: batches of chunks.
        pool: judges.
        log: log that the samples are appended to.
        advance: progress callback.
        in_flight: maximum number of chunks that are being judged while the next batch is sampled.
    """
    under_way: deque[tuple[Chunk, PendingJudgement]] = deque()
    for batch in batches:
        for chunk in batch:
            under_way.append((chunk, PendingJudgement(pool, chunk.judges, chunk.images, _prompts(chunk))))
        while len(under_way) > in_flight:
            _write(*under_way.popleft(), log, advance)
    while under_way:
        _write(*under_way.popleft(), log, advance)


def kept_chunks(
    arm: str, chunks: Sequence[Sequence[SamplePlan]], log: SampleLog, judges: Sequence[str], advance: Advance
) -> Iterator[list[Chunk]]:
    """Yield earlier chunks that lack a score; complete chunks only advance the progress."""
    for plans in chunks:
        rows = [row for plan in plans if (row := log.find(arm, plan.sample_id)) is not None]
        missing = _missing(rows, judges)
        if not missing:
            advance(len(rows))
            continue
        images = tuple(decode_named(log.read_image(row), row.image) for row in rows)
        yield [Chunk(rows=tuple(rows), images=images, judges=missing)]


def drawn_chunks(
    arm: str, chunks: Sequence[Sequence[SamplePlan]], pool: RolloutPool, log: SampleLog, judges: Sequence[str],
    categories: dict[int, str], *, at_once: int,
) -> Iterator[list[Chunk]]:  # fmt: skip
    """Sample chunks, `at_once` of them at a time, and write their images."""
    for start in range(0, len(chunks), at_once):
        wave = chunks[start : start + at_once]
        plans = [plan for chunk in wave for plan in chunk]
        handles = pool.generate(_groups(plans))
        schedules = {name: handle.schedule_id for handle in handles for name in handle.sample_ids}
        ids = [plan.sample_id for plan in plans]
        images_BCHW = dict(zip(ids, pool.images(handles, ids), strict=True))
        batch = []
        for chunk in wave:
            rows = []
            for plan in chunk:
                data = encode_png(images_BCHW[plan.sample_id])
                name = log.image_path(arm, plan.sample_id)
                log.write_image(name, data)
                rows.append(
                    Sample(
                        arm=arm, sample_id=plan.sample_id, prompt_id=plan.prompt_id, prompt=plan.prompt,
                        category=categories[plan.prompt_id], seed=plan.seed, image=name, sha256=digest(data),
                        schedule_id=schedules[plan.sample_id],
                    )
                )  # fmt: skip
            images = tuple(images_BCHW[plan.sample_id] for plan in chunk)
            batch.append(Chunk(rows=tuple(rows), images=images, judges=tuple(judges)))
        yield batch


def found_chunks(
    arm: str, images: Iterable[EncodedImage], log: SampleLog, judges: Sequence[str], categories: dict[str, str],
    advance: Advance,
) -> Iterator[list[Chunk]]:  # fmt: skip
    """Yield chunks of existing images; an unreadable image becomes a sample without scores."""
    numbered, first = enumerate(images), {}
    while encoded := list(itertools.islice(numbered, CHUNK)):
        rows, tensors, broken = [], [], []
        for index, image in encoded:
            row = Sample(
                arm=arm, sample_id=image.key, prompt_id=first.setdefault(image.prompt or index, index),
                prompt=image.prompt, category=categories.get(image.prompt, ""), seed=None, image=image.name,
                sha256=image.sha256,
            )  # fmt: skip
            old = log.find(arm, row.sample_id)
            if old is not None and old.sha256 == row.sha256:
                row = replace(row, scores=old.scores, errors=old.errors)
            try:
                tensors.append(decode_named(image.data, image.name))
                rows.append(row)
            except DataError as error:
                broken.append(replace(row, scores=dict.fromkeys(judges), errors=dict.fromkeys(judges, str(error))))
        if broken:
            log.append(broken)
            advance(len(broken))
        missing = _missing(rows, judges)
        if rows and missing:
            yield [Chunk(rows=tuple(rows), images=tuple(tensors), judges=missing)]
        else:
            advance(len(rows))


def split_chunks(
    arm: str, groups: Sequence[PromptGroup], batch_size: int, log: SampleLog
) -> tuple[list[tuple[SamplePlan, ...]], list[tuple[SamplePlan, ...]]]:
    """Split the samples of an arm into chunks.

    Args:
        arm: name of the arm.
        groups: prompts with their seeds.
        batch_size: samples per chunk.
        log: samples of an earlier call.

    Returns:
        (complete chunks, chunks to sample); a chunk that lacks one sample is sampled again as a whole.
    """
    kept, todo = [], []
    for chunk in chunks_of(groups, batch_size):
        (kept if all(log.find(arm, plan.sample_id) for plan in chunk) else todo).append(chunk)
    return kept, todo


def _write(chunk: Chunk, pending: PendingJudgement, log: SampleLog, advance: Advance) -> None:
    rows = []
    for row, judgement in zip(chunk.rows, pending.result(), strict=True):
        errors = {name: text for name, text in row.errors.items() if name not in judgement.scores}
        rows.append(replace(row, scores={**row.scores, **judgement.scores}, errors={**errors, **judgement.errors}))
    log.append(rows)
    advance(len(rows))


def _missing(rows: Sequence[Sample], judges: Sequence[str]) -> tuple[str, ...]:
    """Return the judges without a score for some row; they score the whole chunk, as in the first call."""
    return tuple(name for name in judges if any(row.scores.get(name) is None for row in rows))


def _prompts(chunk: Chunk) -> list[str]:
    return [row.prompt for row in chunk.rows]


def _groups(plans: Sequence[SamplePlan]) -> list[PromptGroup]:
    return [
        PromptGroup(prompt_id=prompt_id, prompt=found[0].prompt, samples=tuple(found))
        for prompt_id, group in itertools.groupby(plans, key=lambda plan: plan.prompt_id)
        if (found := list(group))
    ]
