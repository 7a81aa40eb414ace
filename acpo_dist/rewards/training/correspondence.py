"""Fine-tune a CLIP for IPCE on captioned images, with or without opinion scores.

Without opinion scores, the label is 5 for an image with its own caption and 0 with the caption of another image. Loss
and optimiser follow Peng et al. (CVPRW 2024): L1, AdamW, weight decay 1e-3, all weights except the temperature.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from acpo_dist.core.errors import DataError
from acpo_dist.core.ports import Advance
from acpo_dist.data.images import read_images, real_images
from acpo_dist.data.parquet_images import parquet_rows
from acpo_dist.rewards.clip_backbone import ClipBackbone
from acpo_dist.rewards.ipce import LEVELS, ipce_quality, ipce_views, level_texts
from acpo_dist.rewards.training.iqa import agreement
from acpo_dist.rewards.training.labels import csv_rows, opinions, split_by_reference

_TOP = 5.0


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """Images with their captions."""

    images: list[Tensor]
    """uint8 RGB, each (3, H, W)."""
    prompts: list[str]
    opinions: list[float] | None
    """Opinion of how well each image matches its caption, scaled to 0 to 5; None without opinions."""


@dataclass(frozen=True, kw_only=True)
class CorrespondenceSettings:
    """Training settings of IPCE."""

    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 5e-6
    held_out: float = 0.2
    """Share of the captions that is held out."""
    patches: int = 8
    short_side: int = 512
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class CorrespondenceReport:
    """Accuracy of IPCE on held-out captions."""

    images: int
    held_out_images: int
    pairs: float
    """Share of held-out images that score higher with their own caption than with another one."""
    pairs_before: float
    """The same share before training."""
    srcc: float | None
    plcc: float | None
    """Agreement with the opinions, if any."""
    seconds: float
    weights: str


def read_captioned(path: Path, *, column: str, prompt_column: str, most: int) -> Captioned:
    """Read captioned images from a parquet file, or a CSV file with `path`, a caption column and optionally `mos`.

    Args:
        path: parquet or CSV file.
        column: image column of a parquet file.
        prompt_column: caption column.
        most: maximum number of images.

    Returns:
        The images with their captions.

    Raises:
        DataError: a file, image or column is missing, or a caption is empty.
    """
    labels = None
    if path.suffix.lower() == ".csv":
        rows = csv_rows(path, ("path", prompt_column), most)
        prompts = [row[prompt_column] or "" for row in rows]
        images = [next(read_images([path.parent / row["path"]]))[1] for row in rows]
        if "mos" in rows[0]:
            labels = [_TOP * label for label in opinions(rows, path)]
    else:
        prompts = _parquet_prompts(path, prompt_column, most)
        images = real_images(path, column=column, most=most)
    empty = [row for row, prompt in enumerate(prompts) if not prompt.strip()]
    if empty:
        raise DataError(f"{path}: {len(empty)} captions are empty, the first in row {empty[0]} (counted from 0).")
    return Captioned(images=images, prompts=prompts, opinions=labels)


def train_ipce(
    data: Captioned, clip: str, out: Path, settings: CorrespondenceSettings, *, progress: Advance | None = None
) -> CorrespondenceReport:
    """Train, measure on held-out captions, and write a folder that `{type: ipce, weights: FOLDER}` loads.

    Args:
        data: captioned images.
        clip: folder or hub id of the initial CLIP.
        out: folder to write.
        settings: training settings.
        progress: called with 1 after every step.

    Returns:
        The report on held-out captions.

    Raises:
        DataError: fewer than ten different captions.
        RewardConfigError: the CLIP cannot be loaded.
    """
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    trainer = _Trainer(data, ClipBackbone(clip, name="ipce", texts=True), settings)
    train, held_out = split_by_reference(data.prompts, settings.held_out, settings.seed)
    before = trainer.pairs(held_out)
    trainer.fit(train, generator, progress)
    scores, labels = trainer.opinions(held_out)
    found = agreement(scores, labels) if len(labels) > 1 else None
    out.mkdir(parents=True, exist_ok=True)
    trainer.clip.save(out)
    report = CorrespondenceReport(
        images=len(train), held_out_images=len(held_out), pairs=trainer.pairs(held_out), pairs_before=before,
        srcc=found.srcc if found else None, plcc=found.plcc if found else None, seconds=time.monotonic() - started,
        weights=str(out),
    )  # fmt: skip
    (out / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report


class _Trainer:
    def __init__(self, data: Captioned, clip: ClipBackbone, settings: CorrespondenceSettings) -> None:
        self.clip, self._data, self._settings = clip, data, settings

    def fit(self, rows: Sequence[int], generator: torch.Generator, progress: Advance | None) -> None:
        """Minimise L1 on the labels, with new random patches in every step."""
        settings, model = self._settings, self.clip.model
        model.train().requires_grad_(True)
        # IPCE keeps the temperature of the contrastive training.
        model.logit_scale.requires_grad_(False)
        trained = [value for value in model.parameters() if value.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=1e-3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
        for _ in range(settings.steps):
            chosen = [rows[i] for i in torch.randint(len(rows), (settings.batch_size,), generator=generator).tolist()]
            strange = torch.rand(len(chosen), generator=generator) < 0.5
            texts, labels = [], []
            for row, other in zip(chosen, strange.tolist(), strict=True):
                other = other and self._data.opinions is None
                texts.append(self._another(row, rows, generator) if other else self._data.prompts[row])
                labels.append(0.0 if other else self._label(row))
            scores = self._quality(chosen, texts, generator)
            loss = (scores - torch.tensor(labels)).abs().mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            decay.step()
            if progress:
                progress(1)
        model.eval().requires_grad_(False)

    @torch.no_grad()
    def pairs(self, rows: Sequence[int]) -> float:
        """Return the share of the rows that score higher with their own caption than with another row's."""
        generator = torch.Generator().manual_seed(self._settings.seed + 1)
        wrong = [self._another(row, rows, generator) for row in rows]
        right = [self._data.prompts[row] for row in rows]
        return float((self._scores(rows, right) > self._scores(rows, wrong)).float().mean())

    @torch.no_grad()
    def opinions(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return scores and opinions of the rows; empty without opinions."""
        if self._data.opinions is None:
            return torch.empty(0), torch.empty(0)
        prompts = [self._data.prompts[row] for row in rows]
        return self._scores(rows, prompts), torch.tensor([self._data.opinions[row] for row in rows])

    def _label(self, row: int) -> float:
        return _TOP if self._data.opinions is None else self._data.opinions[row]

    def _another(self, row: int, rows: Sequence[int], generator: torch.Generator) -> str:
        """Return another caption of these rows; a split has at least two."""
        others = sorted({self._data.prompts[each] for each in rows} - {self._data.prompts[row]})
        return others[int(torch.randint(len(others), (1,), generator=generator))]

    def _scores(self, rows: Sequence[int], texts: list[str]) -> Tensor:
        # The same patches for every image and text, as in the metric.
        seed = self._settings.seed
        return torch.cat([
            self._quality([row], [text], torch.Generator().manual_seed(seed))
            for row, text in zip(rows, texts, strict=True)
        ])  # fmt: skip

    def _quality(self, rows: Sequence[int], texts: list[str], generator: torch.Generator) -> Tensor:
        views = torch.cat([
            ipce_views(
                self._data.images[row][None].float() / 255, size=self.clip.image_size,
                short_side=self._settings.short_side, count=self._settings.patches, generator=generator,
            )
            for row in rows
        ])  # fmt: skip
        vectors = self.clip.image_vectors(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        levels = self.clip.encode_texts([text for prompt in texts for text in level_texts(prompt)])
        return ipce_quality(vectors, levels.unflatten(0, (len(rows), len(LEVELS))), self.clip.scale)


def _parquet_prompts(path: Path, column: str, most: int) -> list[str]:
    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                found = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path} has no column `{column}`. Columns found: {found}.")
            return [str(row[column] or "") for row in islice(parquet_rows(file, path, [column]), most)]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
