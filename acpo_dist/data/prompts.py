"""Prompts of a run, and the seeded order in which iterations use them."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from acpo_dist.core.errors import DataError
from acpo_dist.core.seeding import derive_seed, generator
from acpo_dist.core.types import PromptGroup, SamplePlan
from acpo_dist.data.tables import read_lines, read_table
from acpo_dist.data.toy.world import captions

logger = logging.getLogger(__name__)


def load_prompts(source: str, column: str) -> tuple[str, ...]:
    """Prompts of `data.prompts`, in file order; the index is the prompt id.

    Args:
        source: `toy` (captions of the closed world), `none` (one empty prompt), or a `.txt` file with one prompt per
            line, or a `.csv` or (unquoted) `.tsv` file with a header. Blank prompts are dropped.
        column: column of a CSV or TSV file, in any case.

    Raises:
        DataError: the file is missing or unreadable, lacks the column, or holds no prompt.
    """
    if source == "toy":
        return captions()
    if source == "none":
        return ("",)
    path = Path(source)
    if not path.is_file():
        raise DataError(f"data.prompts: no such file `{source}`. Give `toy`, `none`, or a .txt, .csv or .tsv file.")
    found = [prompt.strip() for prompt in _read(path, column)]
    prompts = tuple(prompt for prompt in found if prompt)
    if not prompts:
        raise DataError(f"data.prompts: {path} holds no prompt.")
    if len(prompts) < len(found):
        logger.info("%s: %d blank prompts dropped, %d kept", path, len(found) - len(prompts), len(prompts))
    return prompts


def sample_prompts(
    prompts: Sequence[str],
    *,
    iteration: int,
    run_seed: int,
    num_prompts: int,
    samples_per_prompt: int,
    stream: str = "train",
) -> list[PromptGroup]:
    """Prompt groups of one iteration; a function of its arguments alone, so a resumed run draws the same.

    The prompts form an endless sequence of seeded permutations. Iteration i takes positions i * num_prompts up to
    (i + 1) * num_prompts of it, so every prompt is used once before any is used again.

    Args:
        iteration: any integer; negative ones continue the sequence backwards.
        stream: independent sequence and seeds for another purpose, such as `calibration`. Streams other than `train`
            put their name before their sample ids.

    Raises:
        ValueError: no prompts, a count below 1, or a stream that is not an identifier.
    """
    if not prompts or num_prompts < 1 or samples_per_prompt < 1:
        raise ValueError(f"nothing to sample: {len(prompts)} prompts, {num_prompts=}, {samples_per_prompt=}")
    if not stream.isidentifier():
        # An identifier has no dash and starts with no digit: ids of two streams can then never be the same.
        raise ValueError(f"a stream must be named by an identifier, found {stream!r}")
    prefix = f"{iteration:06d}" if stream == "train" else f"{stream}-{iteration:06d}"
    chosen = _positions(len(prompts), iteration * num_prompts, num_prompts, stream=stream, run_seed=run_seed)
    return [
        PromptGroup(
            prompt_id=prompt_id,
            prompt=prompts[prompt_id],
            samples=tuple(
                SamplePlan(
                    sample_id=f"{prefix}-{position:04d}-{k}",
                    prompt_id=prompt_id,
                    prompt=prompts[prompt_id],
                    seed=derive_seed("rollout", stream, run_seed, iteration, prompt_id, position, k),
                )
                for k in range(samples_per_prompt)
            ),
        )
        for position, prompt_id in enumerate(chosen)
    ]


def _positions(size: int, start: int, count: int, *, stream: str, run_seed: int) -> list[int]:
    """Entries `start` to `start + count` of the endless sequence of permutations of `range(size)`."""
    passes = range(start // size, (start + count - 1) // size + 1)
    shuffled = [torch.randperm(size, generator=generator("prompts", stream, run_seed, index)) for index in passes]
    offset = start - passes[0] * size
    return torch.cat(shuffled)[offset : offset + count].tolist()


def _read(path: Path, column: str) -> list[str]:
    kind = path.suffix.lower()
    if kind == ".txt":
        return read_lines(path, "data.prompts")
    if kind not in (".csv", ".tsv"):
        raise DataError(f"data.prompts: expected a .txt, .csv or .tsv file, found `{path}`.")
    table = read_table(path, "data.prompts")
    place = table.place(column, "data.prompt_column")
    return [row.cells[place] for row in table.rows]
