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
    """Load the prompts of `data.prompts`, in file order; the index is the prompt id.

    Args:
        source: `toy` (captions of the toy world), `none` (one empty prompt), a `.txt` file with one prompt per line, or
            a `.csv` or (unquoted) `.tsv` file with a header. Blank prompts are dropped.
        column: column of a CSV or TSV file, ignoring case.

    Returns:
        The prompts.

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
    """Select the prompt groups of one iteration. The result depends only on the arguments, so a resumed run repeats it.

    The prompts form an endless sequence of seeded permutations. Iteration i takes positions i * num_prompts up to
    (i + 1) * num_prompts of it, so every prompt is used once before any is used again.

    Args:
        prompts: prompts of the run.
        iteration: any integer; negative ones continue the sequence backwards.
        run_seed: seed of the run.
        num_prompts: number of groups.
        samples_per_prompt: samples per group.
        stream: name of an independent sequence with its own seeds, such as `calibration`. The sample ids of streams
            other than `train` are prefixed with the name.

    Returns:
        The groups.

    Raises:
        ValueError: there are no prompts, a count is below 1, or `stream` is no identifier.
    """
    if not prompts or num_prompts < 1 or samples_per_prompt < 1:
        raise ValueError(f"nothing to sample: {len(prompts)} prompts, {num_prompts=}, {samples_per_prompt=}")
    if not stream.isidentifier():
        # An identifier has no dash and does not start with a digit, so the ids of two streams never collide.
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
    """Return entries `start` to `start + count` of the endless sequence of permutations of `range(size)`."""
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
