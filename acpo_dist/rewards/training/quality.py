"""Train TwoStream on custom images, with damage of known severity or with opinion scores.

The images are split by reference: the report uses no version of a training image, however damaged.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from acpo_dist.core.errors import DataError
from acpo_dist.core.ports import Advance
from acpo_dist.data.images import read_images, real_images
from acpo_dist.data.toy.damage import Damage, dct_quantise, gaussian_blur, grain, pixelate, spoil
from acpo_dist.rewards.training.iqa import IqaReport, LabelledBatch, agreement, fit_iqa
from acpo_dist.rewards.training.labels import csv_rows, opinions, split_by_reference
from acpo_dist.rewards.two_stream import PATCH, PUBLISHED, TOY, TwoStream

SIZES = {"toy": TOY, "published": PUBLISHED}
DAMAGE: dict[str, Damage] = {
    "gaussian_blur": gaussian_blur, "grain": grain, "dct_quantise": dct_quantise, "pixelate": pixelate
}  # fmt: skip
"""Damage kinds. Lowered contrast is excluded: its severity cannot be seen without the reference."""
_CLEAN_SHARE = 0.1
_BLOCK = 8
"""Block size of the damage, in pixels."""
_MARGIN = 8
"""Pixels around a window that are damaged with it and then cropped, because damage differs at borders."""
_MOST_HELD_OUT = 250
_VERSIONS = 4
"""Number of damaged versions of each held-out reference."""


@dataclass(frozen=True, kw_only=True)
class Opinions:
    """Images with labels in [0, 1], higher is better, and the reference of each image."""

    images: list[Tensor]
    """uint8 RGB, each (3, H, W)."""
    labels: list[float]
    references: list[str]


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """Training settings of TwoStream."""

    network: str = "toy"
    """One of `SIZES`."""
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3
    held_out: float = 0.2
    """Share of the references that is held out."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """Training data and agreement on the held-out references."""

    labels: str
    """`damage` or `opinions`."""
    references: int
    held_out_references: int
    held_out_images: int
    srcc: float
    plcc: float
    mean_absolute_error: float
    seconds: float
    weights: str


def read_opinions(path: Path, *, lower_is_better: bool = False, most: int | None = None) -> Opinions:
    """Read images and mean opinion scores from a CSV file.

    Args:
        path: file with the columns `path` (relative to the folder of the file), `mos`, and optionally `reference` (the
            source of the image; by default every image is its own reference).
        lower_is_better: whether lower scores are better, as with DMOS.
        most: maximum number of rows; None reads all.

    Returns:
        Images, labels and references.

    Raises:
        DataError: the file or an image is missing, a column is absent, a score is no number, or all scores are equal.
    """
    rows = csv_rows(path, ("path", "mos"), most)
    labels = opinions(rows, path, lower_is_better=lower_is_better)
    images = [next(read_images([path.parent / row["path"]]))[1] for row in rows]
    return Opinions(
        images=images,
        labels=labels,
        references=[row.get("reference") or row["path"] for row in rows],
    )


def train_two_stream(
    data: list[Tensor] | Opinions, out: Path, settings: QualitySettings, *, progress: Advance | None = None
) -> QualityReport:
    """Train, measure on held-out references, and write weights that `{type: two_stream, weights: FILE}` loads.

    Args:
        data: images without visible flaws, which are damaged here (uint8, each (3, H, W)); or opinions.
        out: safetensors file to write; the report is written beside it as JSON.
        settings: training settings.
        progress: called with 1 after every step.

    Returns:
        The report on held-out references.

    Raises:
        DataError: too few references, or an image below 32 x 32.
    """
    started = time.monotonic()
    images, references = (data, None) if isinstance(data, list) else (data.images, data.references)
    _check_sizes(images)
    train, held_out = split_by_reference(
        references or [str(row) for row in range(len(images))], settings.held_out, settings.seed
    )
    torch.manual_seed(settings.seed)
    network = TwoStream(SIZES[settings.network])
    labels = None if isinstance(data, list) else torch.tensor(data.labels)
    fit_iqa(
        network, _windows(images, train, labels), steps=settings.steps, batch_size=settings.batch_size,
        seed=settings.seed, learning_rate=settings.learning_rate, progress=progress,
    )  # fmt: skip
    if isinstance(data, list):
        held_out = held_out[:_MOST_HELD_OUT]
        found, count = _measure_damage(network, [images[row] for row in held_out], settings.seed)
    else:
        found, count = _measure_opinions(network, data, held_out), len(held_out)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, out)
    of = references or list(map(str, range(len(images))))
    report = QualityReport(
        labels="damage" if isinstance(data, list) else "opinions",
        references=len({of[row] for row in train}), held_out_references=len({of[row] for row in held_out}),
        held_out_images=count, weights=str(out), **asdict(replace(found, seconds=time.monotonic() - started)),
    )  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report


def _windows(images: list[Tensor], rows: list[int], labels: Tensor | None) -> LabelledBatch:
    """Return a source of random tile-sized windows with their severities, damaged unless there are labels."""
    smallest = min(min(images[row].shape[1:]) for row in rows)
    margin = _MARGIN if labels is None and smallest >= PATCH + 2 * _MARGIN else 0
    whole = PATCH + 2 * margin

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = [rows[index] for index in torch.randint(len(rows), (count,), generator=generator).tolist()]
        places = torch.rand(count, 2, generator=generator).tolist()
        windows = torch.stack([_window(images[row], whole, *place) for row, place in zip(chosen, places, strict=True)])
        if labels is not None:
            return windows, 1 - labels[chosen]
        flip = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        spoiled, severity = spoil(
            torch.where(flip, windows.flip(-1), windows), DAMAGE, generator, clean_share=_CLEAN_SHARE
        )
        return spoiled[..., margin : margin + PATCH, margin : margin + PATCH], severity

    return draw


def _window(image: Tensor, side: int, down: float, right: float) -> Tensor:
    """Crop a square as float32 in [0, 1]; `down` and `right` in [0, 1) give its relative position."""
    top, left = (
        int(place * (length - side + 1)) for place, length in ((down, image.shape[1]), (right, image.shape[2]))
    )
    return image[:, top : top + side, left : left + side].float() / 255


@torch.no_grad()
def _measure_damage(network: TwoStream, references: list[Tensor], seed: int) -> tuple[IqaReport, int]:
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    scores, labels = [], []
    for image in references:
        height, width = (length // _BLOCK * _BLOCK for length in image.shape[1:])
        versions = (image[None, :, :height, :width].float() / 255).expand(_VERSIONS, -1, -1, -1)
        spoiled, severity = spoil(versions, DAMAGE, generator, clean_share=_CLEAN_SHARE)
        scores.append(network(spoiled))
        labels.append(1 - severity)
    return agreement(torch.cat(scores), torch.cat(labels)), _VERSIONS * len(references)


@torch.no_grad()
def _measure_opinions(network: TwoStream, data: Opinions, rows: list[int]) -> IqaReport:
    scores = torch.cat([network(data.images[row][None].float() / 255) for row in rows])
    return agreement(scores, torch.tensor([data.labels[row] for row in rows]))


def _check_sizes(images: list[Tensor]) -> None:
    small = [tuple(image.shape[1:]) for image in images if min(image.shape[1:]) < PATCH]
    if small:
        raise DataError(
            f"{len(small)} of {len(images)} images are below {PATCH} x {PATCH} pixels, such as {small[0][0]} x "
            f"{small[0][1]} (height x width). Leave them out."
        )


def load_training_data(path: Path, *, column: str, most: int | None, lower_is_better: bool) -> list[Tensor] | Opinions:
    """Load the data of `train_two_stream`: a CSV file of opinions, or a folder or parquet file of clean images."""
    if path.suffix.lower() == ".csv":
        return read_opinions(path, lower_is_better=lower_is_better, most=most)
    return real_images(path, column=column, most=most)
