"""Captioned real images as latents: encoded once into a cache folder, and read by random key in batches of one size."""

import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from acpo_dist.config.schema import DataConfig
from acpo_dist.core.errors import DataError
from acpo_dist.core.seeding import derive_seed
from acpo_dist.core.sizes import Size, nearest_size, size_text
from acpo_dist.data.captions import CAPTION_COLUMNS
from acpo_dist.data.decoding import UNDECODABLE, central_box, decode, fit
from acpo_dist.data.encoded import EncodedImage, EncodedImages
from acpo_dist.models.text import content_digest, fingerprint

logger = logging.getLogger(__name__)

SHARD = 64
"""Images per file of the cache; an interrupted run repeats at most one file."""
_FLIPPED = "-flipped"


@dataclass(frozen=True, kw_only=True)
class RealImage:
    """One cached image."""

    key: str
    """Name of the image in its folder, archive or parquet file."""
    caption: str
    original: Size
    """(width, height) of the file in pixels."""
    crop: tuple[int, int]
    """Top and left of the crop, in pixels of the image resized to cover `size`."""
    size: Size
    """(width, height) of the encoded crop."""
    shard: str
    """File of the cache with the latents."""


@dataclass(frozen=True, kw_only=True)
class RealBatch:
    """Latents of real images of one size."""

    clean: Tensor
    """x_0 (B, C, H, W)."""
    captions: tuple[str, ...]
    conditioning: Mapping[str, Tensor]
    """Size conditioning of the images, by the names of `Condition`."""


class RealImages:
    """The captioned images of `data.path`, encoded by a latent model."""

    def __init__(self, data: DataConfig, family: Any, cache: Path, *, held_out: bool = False) -> None:
        """Encode the images that the cache lacks.

        Several processes may share the cache: each file is written atomically, and its content does not depend on the
        process that writes it.

        Args:
            data: the `data` section; `path` is set.
            family: the model, whose sizes are the buckets.
            cache: folder of the cache.
            held_out: use the held-out images instead of the others.

        Raises:
            DataError: no image is usable.
        """
        assert data.path is not None
        self._family, self._data = family, data
        columns = (data.caption_column,) if data.caption_column else CAPTION_COLUMNS
        source = EncodedImages(data.path, image_column=data.image_column, caption_columns=columns)
        wanted = _spread(len(source), data.max_images)
        self._folder = cache / self._fingerprint(source)
        entries = self._encode_missing(source, wanted)
        chosen = [entry for entry in entries if is_held_out(entry.key, data.held_out) == held_out]
        if not chosen:
            which = "held-out images" if held_out else "images for training"
            raise DataError(
                f"data.path: {data.path} gives no {which}: {len(entries)} of {len(wanted)} images are usable (readable "
                f"and captioned), and data.held_out is {data.held_out:g}."
            )
        self.images = chosen
        """The images, in the order of `data.path`."""
        self._of_size: dict[Size, list[RealImage]] = {}
        for entry in chosen:
            self._of_size.setdefault(entry.size, []).append(entry)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def batch(self, keys: Sequence[int]) -> RealBatch:
        """Return one image per key, all of one size.

        Every image has the same probability under random keys: the first key selects the size, in proportion to its
        number of images.

        Args:
            keys: random integers; the low 31 bits select the image, and the next one flips it if `data.flip` is set.
        """
        low = [key % 2**31 for key in keys]
        bucket = self._of_size[self.images[low[0] % len(self.images)].size]
        return self._read([bucket[key % len(bucket)] for key in low], [key >> 31 & 1 for key in keys])

    def in_order(self, most: int) -> Iterator[RealBatch]:
        """Yield all images without flips, in batches of up to `most` of one size."""
        for bucket in self._of_size.values():
            for start in range(0, len(bucket), most):
                part = bucket[start : start + most]
                yield self._read(part, [0] * len(part))

    def _read(self, entries: Sequence[RealImage], flips: Sequence[int]) -> RealBatch:
        names = [
            entry.key + _FLIPPED * bool(flip and self._data.flip) for entry, flip in zip(entries, flips, strict=True)
        ]
        latents = [
            _open(self._folder / entry.shard).get_tensor(name) for entry, name in zip(entries, names, strict=True)
        ]
        return RealBatch(
            clean=torch.stack(latents).float(), captions=tuple(entry.caption for entry in entries),
            conditioning=self._family.size_conditioning(
                [entry.original for entry in entries], [entry.crop for entry in entries], entries[0].size
            ),
        )  # fmt: skip

    def _fingerprint(self, source: EncodedImages) -> str:
        """Name of the cache: a hash of everything that latents and captions depend on."""
        config, data = self._family.config, self._data
        names = ("type", "path", "revision", "variant", "vae", "vae_dtype")
        model = {name: str(getattr(config, name)) for name in names}
        own = Path(config.vae) if config.vae is not None else None
        vae = [own] if own is not None and own.is_file() else sorted(own.rglob("*")) if own is not None else []
        return fingerprint(
            self._family.path, ["vae"], model=model, sizes=self._sizes, flip=data.flip, max_images=data.max_images,
            image_column=data.image_column, files=source.stamp(), captions=source.captions(),
            vae=[content_digest(path) for path in vae if path.is_file()],
        )  # fmt: skip

    @property
    def _sizes(self) -> list[Size]:
        return [size for size, _ in self._family.config.sizes] or [self._family.size]

    def _encode_missing(self, source: EncodedImages, wanted: Sequence[int]) -> list[RealImage]:
        parts = [wanted[start : start + SHARD] for start in range(0, len(wanted), SHARD)]
        names = [f"{number:06d}.safetensors" for number in range(len(parts))]
        known: dict[str, dict[str, Any]] = {}
        # Ranks that start together begin with different files.
        first = os.getpid() % max(1, len(parts))
        for number in (*range(first, len(parts)), *range(first)):
            path = self._folder / names[number]
            facts = _facts(path)
            if facts is None:
                facts = self._encode(source.read(parts[number]), path)
                logger.info("%s: %d of %d files of latents", self._folder, number + 1, len(parts))
            known[names[number]] = facts
        self._report(source, [known[name] for name in names])
        return [
            RealImage(
                key=row["key"], caption=row["caption"], original=tuple(row["original"]), crop=tuple(row["crop"]),
                size=tuple(row["size"]), shard=name,
            )
            for name in names
            for row in known[name]["images"]
        ]  # fmt: skip

    def _encode(self, images: Iterator[EncodedImage], path: Path) -> dict[str, Any]:
        tensors: dict[str, Tensor] = {}
        rows: list[dict[str, Any]] = []
        passed: list[list[str]] = []
        enlarged = 0
        for image in images:
            if not image.prompt:
                passed.append([image.name, "no caption"])
                continue
            try:
                decoded = decode(image.source)
            except UNDECODABLE:
                passed.append([image.name, "not readable"])
                continue
            original = decoded.size
            size = nearest_size(self._sizes, *original)
            left, top, right, _ = central_box(original, size)
            scale = size[0] / (right - left)
            enlarged += scale > 1
            pixels = torch.from_numpy(np.ascontiguousarray(fit(decoded, size))).float()[None] / 255
            tensors[image.name] = self._latents(pixels)
            if self._data.flip:
                tensors[image.name + _FLIPPED] = self._latents(pixels.flip(-1))
            rows.append(
                {
                    "key": image.name, "caption": image.prompt, "original": original,
                    "crop": (round(top * scale), round(left * scale)), "size": size,
                }
            )  # fmt: skip
        facts = {"images": rows, "passed": passed, "enlarged": enlarged}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{secrets.token_hex(8)}.partial")
        save_file(tensors, partial, metadata={"facts": json.dumps(facts)})
        os.replace(partial, path)
        return facts

    @torch.no_grad()
    def _latents(self, pixels: Tensor) -> Tensor:
        return self._family.encode_images(pixels)[0].cpu().contiguous()

    def _report(self, source: EncodedImages, found: Sequence[Mapping[str, Any]]) -> None:
        """Log how many images are passed over, why, and which."""
        passed = [tuple(entry) for facts in found for entry in facts["passed"]]
        for reason, count in Counter(reason for _, reason in passed).items():
            names = [name for name, why in passed if why == reason][:3]
            logger.warning(
                "%s: %d images are not used (%s), such as %s", self._data.path, count, reason, ", ".join(names)
            )
        enlarged = sum(facts["enlarged"] for facts in found)
        if enlarged:
            logger.warning("%s: %d images are smaller than their size and are enlarged", self._data.path, enlarged)
        sizes = Counter(size_text(tuple(row["size"])) for facts in found for row in facts["images"])
        logger.info("%s: %s", self._data.path, ", ".join(f"{count} of {size}" for size, count in sizes.items()))


def is_held_out(key: str, share: float) -> bool:
    """Return whether an image belongs to the held-out share; it depends only on its name."""
    return share > 0 and derive_seed("held out", key) / 2**63 < share


def _spread(count: int, most: int | None) -> list[int]:
    kept = min(count, most or count)
    return [index * count // kept for index in range(kept)] if kept else []


def _facts(path: Path) -> dict[str, Any] | None:
    """Facts of a file of the cache, or None if it is missing or incomplete."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["facts"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


@lru_cache(maxsize=64)
def _open(path: Path) -> Any:
    return safe_open(path, "pt")
