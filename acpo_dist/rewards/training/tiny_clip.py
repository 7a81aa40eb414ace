"""Train a CLIP of the toy world: contrastively on its captioned scenes, then as IPCE on graded agreement.

The second stage needs no human scores. An image is paired with the caption of a scene that shares none, one, two or
all three of shape, colour and background with it, and the label is 5/3 per shared word. Held-out combinations of
place and size are never trained on; the report compares true and wrong captions on them.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from transformers.utils.logging import disable_progress_bar

from acpo_dist.data.toy.text import vocabulary, write_tokenizer
from acpo_dist.data.toy.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, caption_index, captions, templates
from acpo_dist.rewards.clip_backbone import OPENAI_MEAN, OPENAI_STD
from acpo_dist.rewards.ipce import LEVELS, ipce_quality, ipce_views, level_texts

logger = logging.getLogger(__name__)

CONTEXT = 24
"""Maximum number of tokens of a text; a caption within IPCE's sentence takes 16."""
HELD_OUT_PER_CAPTION = 4
"""Number of held-out scenes of the 18 that share a caption."""
_END = "<|endoftext|>"
_UNKNOWN = "<|unknown|>"
_SHORT_SIDE = 512
_GRADES = 5.0 / 3.0


@dataclass(frozen=True, kw_only=True)
class TinyClipReport:
    """Share of pairs on held-out scenes in which the true caption scores above a wrong one."""

    clip_pairs: float
    ipce_pairs: float
    ipce_close_pairs: float
    """The same share if the wrong caption differs in a single word."""
    ipce_error: float
    """Mean absolute error of IPCE against the label, on a scale of 0 to 5."""
    seconds: float


def new_tiny_clip(*, width: int = 64, layers: int = 3, patch: int = 8) -> CLIPModel:
    """Return an untrained transformers CLIP of 0.2 M parameters for 32 x 32 pixels and the words of the toy world."""
    vocab, _ = _vocabulary()
    shared: dict[str, Any] = dict(
        hidden_size=width, intermediate_size=2 * width, num_attention_heads=4, projection_dim=width
    )
    text = CLIPTextConfig(
        vocab_size=len(vocab), max_position_embeddings=CONTEXT, num_hidden_layers=2, hidden_act="gelu",
        bos_token_id=vocab["<|startoftext|>"], eos_token_id=vocab[_END], pad_token_id=vocab[_END], **shared,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE, patch_size=patch, num_hidden_layers=layers, hidden_act="gelu", **shared
    )
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=width)  # pyright: ignore[reportCallIssue]
    )


def save_tiny_clip(folder: Path, model: CLIPModel) -> None:
    """Write a folder that `CLIPModel.from_pretrained` and `CLIPTokenizer.from_pretrained` load."""
    model.save_pretrained(folder)
    write_tokenizer(folder)
    vocab, merges = _vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    # The unknown token must differ from the end token: the text vector is read at the first end token.
    settings |= {"model_max_length": CONTEXT, "unk_token": _UNKNOWN}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": OPENAI_MEAN, "image_std": OPENAI_STD, "size": {"shortest_edge": IMAGE_SIZE}})
    )


def train_tiny_clip(
    folder: Path, *, steps: int = 500, ipce_steps: int = 400, seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> TinyClipReport:  # fmt: skip
    """Train both stages on the training scenes, save the model, and measure it on the held-out scenes.

    Args:
        folder: folder to write.
        steps: steps of the contrastive stage, each of all 48 captions with one scene each.
        ipce_steps: steps of the IPCE stage, each of 24 images; 0 leaves IPCE zero-shot.
        seed: seed of the split and of training.
        progress: called after every step with its number, the number of steps of both stages, and the loss.

    Returns:
        The report on held-out scenes.
    """
    started = time.monotonic()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = new_tiny_clip()
    disable_progress_bar()
    # Saved before training only for the tokenizer; the weights are written again at the end.
    save_tiny_clip(folder, model)
    stages = _Stages(model, CLIPTokenizer.from_pretrained(folder), split_scenes(seed)[0], generator)
    model.train()
    for number, (count, rate, loss_of) in enumerate(
        ((steps, 2e-3, stages.contrastive), (ipce_steps, 1e-3, stages.ipce))
    ):
        if count:
            # IPCE keeps the temperature of the contrastive stage.
            model.logit_scale.requires_grad_(number == 0)
            _descend(model, loss_of, count, rate, lambda step, loss, done=number * steps: (
                progress(done + step, steps + ipce_steps, loss) if progress else None
            ))  # fmt: skip
    model.requires_grad_(True)
    model.save_pretrained(folder)
    return _measure(model, stages, seed, started)


def split_scenes(seed: int) -> tuple[Tensor, Tensor]:
    """Return template ids for training (48, 14) and held out (48, 4), one row per caption."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.nonzero(caption_index() == index).flatten() for index in range(len(captions()))])
    order = torch.stack([torch.randperm(rows.shape[1], generator=generator) for _ in rows])
    rows = rows.gather(1, order)
    return rows[:, HELD_OUT_PER_CAPTION:], rows[:, :HELD_OUT_PER_CAPTION]


def shared_words() -> Tensor:
    """Return how many of shape, colour and background two captions share: int64 (48, 48), 0 to 3."""
    parts = torch.cartesian_prod(*(torch.arange(len(kind)) for kind in (SHAPES, COLOURS, BACKGROUNDS)))
    return (parts[:, None] == parts[None]).sum(-1)


class _Stages:
    """The two losses, on random training scenes with light noise."""

    def __init__(self, model: CLIPModel, tokenizer: Any, scenes: Tensor, generator: torch.Generator) -> None:
        self._model, self._scenes, self._generator = model, scenes, generator
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in (OPENAI_MEAN, OPENAI_STD))
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        self.captions = tokenizer(list(captions()), **options)["input_ids"]
        levels = tokenizer([text for caption in captions() for text in level_texts(caption)], **options)["input_ids"]
        self._levels = levels.unflatten(0, (len(captions()), len(LEVELS)))

    def contrastive(self) -> Tensor:
        """Compute CLIP's symmetric cross entropy over the 48 captions."""
        picked = torch.randint(self._scenes.shape[1], (len(self._scenes), 1), generator=self._generator)
        images = self._noisy(templates()[self._scenes.gather(1, picked)[:, 0]])
        logits = self._model.logit_scale.exp() * self.images(images) @ self.texts(self.captions).T
        wanted = torch.arange(len(logits))
        return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2

    def ipce(self, count: int = 24, patches: int = 2) -> Tensor:
        """Compute IPCE's L1 loss on graded agreement, with new random patches in every step."""
        own = torch.randint(len(self._scenes), (count,), generator=self._generator)
        column = torch.randint(self._scenes.shape[1], (count,), generator=self._generator)
        shown, label = self._graded(own)
        images = self._noisy(templates()[self._scenes[own, column]])
        return (self.quality(images, shown, patches=patches, generator=self._generator) - label).abs().mean()

    def _graded(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return captions that share 0 to 3 words with the own ones, each number equally often, and their labels."""
        wanted = torch.randint(4, own.shape, generator=self._generator)
        fits = shared_words()[own] == wanted[:, None]
        shown = torch.multinomial(fits.float(), 1, generator=self._generator)[:, 0]
        return shown, _GRADES * wanted

    def quality(self, images: Tensor, shown: Tensor, *, patches: int, generator: torch.Generator) -> Tensor:
        """Compute IPCE (B,) of images with the given caption ids."""
        views = ipce_views(images, size=IMAGE_SIZE, short_side=_SHORT_SIDE, count=patches, generator=generator)
        vectors = self.images(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        known, place = shown.unique(return_inverse=True)
        levels = self.texts(self._levels[known].flatten(0, 1)).unflatten(0, (len(known), len(LEVELS)))
        return ipce_quality(vectors, levels[place], self._model.logit_scale.exp())

    def images(self, views: Tensor) -> Tensor:
        """Return unit vectors (N, D) of views (N, 3, S, S) in [0, 1]."""
        pooled: Any = self._model.vision_model(pixel_values=(views - self._mean) / self._std).pooler_output
        return F.normalize(self._model.visual_projection(pooled), dim=-1)

    def texts(self, token_ids: Tensor) -> Tensor:
        """Return unit vectors (N, D) of token ids (N, L)."""
        pooled: Any = self._model.text_model(input_ids=token_ids).pooler_output
        return F.normalize(self._model.text_projection(pooled), dim=-1)

    def _noisy(self, images: Tensor) -> Tensor:
        scale = 0.05 * torch.rand(len(images), 1, 1, 1, generator=self._generator)
        return (images + scale * torch.randn(images.shape, generator=self._generator)).clamp(0, 1)


def _descend(
    model: CLIPModel, loss_of: Callable[[], Tensor], count: int, rate: float, report: Callable[[int, float], None]
) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=count, pct_start=0.1)
    for step in range(1, count + 1):
        loss = loss_of()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        decay.step()
        report(step, loss.item())
        if step % 100 == 0:
            logger.info("tiny clip step %d of %d: loss %.4f", step, count, loss.item())


@torch.no_grad()
def _measure(model: CLIPModel, stages: _Stages, seed: int, started: float) -> TinyClipReport:
    model.eval()
    generator = torch.Generator().manual_seed(seed + 1)
    held_out = split_scenes(seed)[1]
    own = torch.arange(len(held_out)).repeat_interleave(held_out.shape[1])
    images = templates()[held_out.flatten()]
    similarity = stages.images(images) @ stages.texts(stages.captions).T
    wrong = torch.ones_like(similarity).scatter(1, own[:, None], 0).bool()
    above = similarity.gather(1, own[:, None]) > similarity
    shared = shared_words()[own]

    def quality(shown: Tensor) -> Tensor:
        # The same patches for every caption, as in the metric.
        patches = torch.Generator().manual_seed(seed)
        return stages.quality(images, shown, patches=8, generator=patches)

    far, close = (torch.multinomial(kind.float(), 1, generator=generator)[:, 0] for kind in (wrong, shared == 2))
    true, false = quality(own), quality(far)
    errors = torch.stack([true - 3 * _GRADES, false - _GRADES * shared.gather(1, far[:, None])[:, 0]])
    return TinyClipReport(
        clip_pairs=float(above[wrong].float().mean()),
        ipce_pairs=float((true > false).float().mean()),
        ipce_close_pairs=float((true > quality(close)).float().mean()),
        ipce_error=float(errors.abs().mean()),
        seconds=time.monotonic() - started,
    )


def _vocabulary() -> tuple[dict[str, int], list[str]]:
    """Return vocabulary and merges of the toy tokenizer, followed by IPCE's words, digits and punctuation."""
    vocab, merges = vocabulary()
    tokens = dict.fromkeys(token for token in vocab if not token.startswith("<|"))
    pairs = dict.fromkeys(merges)
    signs = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    tokens.update(dict.fromkeys([*signs, *(sign + "</w>" for sign in signs)]))
    for word in ("photo", "that", "matches", *LEVELS):
        merged = word[0]
        for piece in [*word[1:-1], word[-1] + "</w>"]:
            pairs.setdefault(f"{merged} {piece}")
            merged += piece
            tokens.setdefault(merged)
    tokens.update(dict.fromkeys([_UNKNOWN, "<|startoftext|>", _END]))
    return {token: index for index, token in enumerate(tokens)}, list(pairs)
