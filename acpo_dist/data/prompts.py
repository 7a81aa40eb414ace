"""Prompts of a run, and the seeded order in which iterations use them."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import lcm
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import DataError, quoted
from acpo_dist.core.seeding import derive_seed, generator
from acpo_dist.core.sizes import Size
from acpo_dist.core.types import PromptGroup, SamplePlan
from acpo_dist.data.captions import CAPTION_COLUMNS, read_json_lines
from acpo_dist.data.encoded import EncodedImages
from acpo_dist.data.images import is_archive, is_parquet
from acpo_dist.data.parquet_images import parquet_rows
from acpo_dist.data.tables import find_column, read_lines, read_table, read_text
from acpo_dist.data.toy.world import captions

logger = logging.getLogger(__name__)

_GOLDEN = 0.6180339887498949
_KINDS = "a .txt, .csv, .tsv, .jsonl or .parquet file, or a folder of captioned images"


@dataclass(frozen=True, kw_only=True)
class SizeMix:
    """Several sizes with their shares of the samples."""

    sizes: tuple[Size, ...]
    shares: tuple[float, ...]
    """One positive number per size; only their ratios matter."""
    micro_batch: int = 1
    """Consecutive training samples that have one size."""

    def block(self, samples_per_prompt: int, *, stream: str) -> int:
        """Return the number of consecutive prompt groups with one size: whole micro-batches in the stream `train`."""
        return lcm(self.micro_batch, samples_per_prompt) // samples_per_prompt if stream == "train" else 1

    def pick(self, index: int, *parts: int | str) -> Size:
        """Return the size of one block; consecutive blocks follow the shares closely.

        Args:
            index: number of the block, any integer.
            parts: what the order is seeded with.
        """
        share = (derive_seed("size", *parts) / 2**63 + index * _GOLDEN) % 1.0
        ends = list(accumulate(self.shares))
        return next(
            (size for size, end in zip(self.sizes, ends, strict=True) if share * ends[-1] < end), self.sizes[-1]
        )


def size_mix(config: Config) -> SizeMix | None:
    """Return the sizes that a run mixes, or None if all its images have one size."""
    sizes = config.model.sizes
    if len(sizes) < 2:
        return None
    return SizeMix(
        sizes=tuple(size for size, _ in sizes), shares=tuple(share for _, share in sizes),
        micro_batch=config.learner.micro_batch,
    )  # fmt: skip


def load_prompts(source: str, column: str, *, weights: str = "refuse") -> tuple[str, ...]:
    """Load the prompts of `data.prompts`, in file order; the index is the prompt id.

    Args:
        source: `toy` (captions of the toy world), `none` (one empty prompt), a `.txt` file with one prompt per line, a
            `.csv`, (unquoted) `.tsv`, `.jsonl` or `.parquet` file, or the captions of a folder or archive of images.
            Blank prompts are dropped.
        column: column of a table, ignoring case.
        weights: `data.prompt_weights`.

    Returns:
        The prompts.

    Raises:
        DataError: the file is missing or unreadable, lacks the column, or holds no prompt; or a prompt has weights.
    """
    if source == "toy":
        return captions()
    if source == "none":
        return ("",)
    path = Path(source)
    if not path.exists():
        raise DataError(f"data.prompts: no such file `{source}`. Give `toy`, `none`, or {_KINDS}.")
    found = [prompt.strip() for prompt in _read(path, column)]
    prompts = tuple(prompt for prompt in found if prompt)
    if not prompts:
        raise DataError(f"data.prompts: {path} holds no prompt.")
    if len(prompts) < len(found):
        logger.warning("%s: %d blank prompts dropped, %d kept", path, len(found) - len(prompts), len(prompts))
    require_no_weights(prompts, weights, f"data.prompts: {path}")
    return prompts


def run_prompts(config: Config) -> tuple[str, ...]:
    """Load the prompts of a run, and check its negative prompt for weights.

    Raises:
        DataError: as `load_prompts`.
    """
    data, negative = config.data, getattr(config.model, "negative_prompt", None)
    require_no_weights([negative or ""], data.prompt_weights, "model.negative_prompt")
    return load_prompts(data.prompts, data.prompt_column, weights=data.prompt_weights)


_WEIGHTED = re.compile(r"\([^()]*:\s*[-+]?[0-9]*\.?[0-9]+\s*\)")


def require_no_weights(prompts: Sequence[str], weights: str, where: str) -> None:
    """Reject prompts with weights such as `(a red car:1.2)`, which no text encoder here reads.

    Args:
        prompts: the prompts.
        weights: `data.prompt_weights`; `literal` accepts them as plain text.
        where: source of the prompts, for the message.

    Raises:
        DataError: a prompt has weights and `weights` is `refuse`.
    """
    if weights == "literal":
        return
    found = [prompt for prompt in prompts if _WEIGHTED.search(prompt)]
    if found:
        part = _WEIGHTED.search(found[0])
        assert part is not None
        raise DataError(
            f"{where}: {len(found)} of {len(prompts)} prompts have weights, such as {quoted(part[0])}. Weights have no "
            "effect here: remove them, or encode them as plain text with data.prompt_weights=literal (`acpo generate`: "
            "--literal-weights)."
        )


def sample_prompts(
    prompts: Sequence[str],
    *,
    iteration: int,
    run_seed: int,
    num_prompts: int,
    samples_per_prompt: int,
    stream: str = "train",
    mix: SizeMix | None = None,
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
        mix: sizes of the images; None leaves the size to the model. All samples of a group have one size.

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
    block = mix.block(samples_per_prompt, stream=stream) if mix else 1
    blocks = -(-num_prompts // block)
    sizes = [mix.pick(iteration * blocks + number, stream, run_seed) if mix else None for number in range(blocks)]
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
                    size=sizes[position // block],
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
    if path.is_dir() or is_archive(path):
        return _captions(path, column)
    if kind == ".txt":
        return read_lines(path, "data.prompts")
    if is_parquet(path):
        return _column(path, column)
    if kind in (".jsonl", ".ndjson"):
        rows = read_json_lines(read_text(path, "data.prompts").encode(), f"data.prompts: {path}")
        names = list(dict.fromkeys(name for row in rows for name in row))
        name = find_column(names, column, f"data.prompts: {path}")
        return [str(row.get(name) or "") for row in rows]
    if kind not in (".csv", ".tsv"):
        raise DataError(f"data.prompts: expected {_KINDS}, found `{path}`.")
    table = read_table(path, "data.prompts")
    place = table.place(column, "data.prompt_column")
    return [row.cells[place] for row in table.rows]


def _column(path: Path, column: str) -> list[str]:
    try:
        with pq.ParquetFile(path) as file:
            name = find_column(file.schema_arrow.names, column, f"data.prompts: {path}")
            return [str(row[name] or "") for row in parquet_rows(file, path, [name])]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data.prompts: {path} is not a readable parquet file: {error}") from error


def _captions(path: Path, column: str) -> list[str]:
    images = EncodedImages(path, caption_columns=tuple(dict.fromkeys((column, *CAPTION_COLUMNS))))
    found = images.captions()
    without = found.count("")
    if without == len(found):
        raise DataError(
            f"data.prompts: {path} holds {len(found)} images and no caption: expected a .txt file beside each image, "
            "or metadata.jsonl."
        )
    if without:
        logger.warning("%s: %d of %d images have no caption and give no prompt", path, without, len(found))
    return [caption for caption in found if caption]
