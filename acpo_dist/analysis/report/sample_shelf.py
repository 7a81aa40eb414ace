"""The gallery as HTML: a slider between base and tuned for each prompt and seed, with scores below."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from acpo_dist.analysis.report.gallery import Gallery, Pair
from acpo_dist.analysis.report.html import signed
from acpo_dist.analysis.report.sample_renderer import Sample
from acpo_dist.tracking.panel import SIGMA

LARGEST = 512
"""Pixels of the longer side inside the page; the files in the run's `report/` folder keep their own size."""
_LOSSLESS = 128
"""Up to this side images go in as PNG."""
_WORDS = {"+": ("won", "▲ gained"), "-": ("lost", "▼ lost"), "same": ("same", "● same")}
_ORDERS = (("worst", "worst first"), ("best", "best first"), ("prompt", "by prompt"))


def shelf(gallery: Gallery, index: int) -> str:
    """All cards, the worst regression first, with buttons for other orders."""
    by_gain = sorted(range(len(gallery.pairs)), key=lambda place: gallery.pairs[place].gain)
    rank = {place: order for order, place in enumerate(by_gain)}
    by_prompt = sorted(range(len(gallery.pairs)), key=lambda place: (gallery.pairs[place].base.prompt, place))
    alphabet = {place: order for order, place in enumerate(by_prompt)}
    buttons = "".join(
        f'<button type="button" data-order="{key}" aria-pressed="{str(key == "worst").lower()}">{name}</button>'
        for key, name in _ORDERS
    )
    cards = "".join(
        _card(gallery.pairs[place], f"{index}-{place}", worst=rank[place], prompt=alphabet[place]) for place in by_gain
    )
    lost = sum(pair.gain < 0 for pair in gallery.pairs)
    whose = "the judges" if gallery.judged else "the rewards"
    text = f"{len(gallery.pairs)} pairs at iteration {gallery.iteration}: {lost} lost by {whose}"
    everywhere = (
        f'<label class="all" for="all-{index}">all sliders'
        f'<input type="range" min="0" max="100" value="50" id="all-{index}" data-all></label>'
    )
    return (
        f'<div class="shelf-bar"><p role="status">{escape(text)}</p><div class="orders" role="group" '
        f'aria-label="Order of the images">{buttons}</div>{everywhere}</div><div class="shelf">{cards}</div>'
    )


def embedded(sample: Sample) -> tuple[str, int, int]:
    """(data address, width, height) of an image as it goes into the page."""
    with Image.open(sample.file) as opened:
        image = opened.convert("RGB")
    if max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "PNG" if max(image.size) <= _LOSSLESS else "JPEG"
    image.save(buffer, format=kind, **({"optimize": True} if kind == "PNG" else {"quality": 88}))
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{text}", *image.size


def _card(pair: Pair, name: str, *, worst: int, prompt: int) -> str:
    before, width, height = embedded(pair.base)
    after, _, _ = embedded(pair.tuned)
    sharp = " sharp" if width < LARGEST // 2 else ""
    size = f'width="{width}" height="{height}"'
    about = escape(pair.base.prompt or "no prompt")
    shown = signed(pair.gain)
    tone, word = _WORDS["same" if shown in ("+0.00", "-0.00") else shown[0]]
    return (
        f'<article class="pair {tone}" data-worst="{worst}" data-prompt="{prompt}">'
        f'<div class="wipe{sharp}" style="aspect-ratio:{width}/{height}">'
        f'<img src="{before}" {size} alt="base model: {about}">'
        f'<img class="over" src="{after}" {size} alt="tuned model: {about}">'
        '<span class="tag left" aria-hidden="true">base</span><span class="tag right" aria-hidden="true">tuned</span>'
        f'<i class="edge" aria-hidden="true"></i><label class="hidden" for="wipe-{name}">How much of the base image '
        f"is seen: {about}, seed {pair.base.seed}</label>"
        f'<input type="range" min="0" max="100" value="50" id="wipe-{name}"></div>'
        f'<p class="gain"><strong>{word} {shown} {SIGMA}</strong></p>'
        f'<p class="prompt">{about}</p>{_scores([pair.base, pair.tuned])}'
        f'<p class="seed" title="seed {pair.base.seed}">seed {pair.base.seed}</p></article>'
    )


def _scores(samples: Sequence[Sample]) -> str:
    base, tuned = samples
    rows = "".join(
        f'<tr><th scope="row">{escape(name).replace("_", "_<wbr>")}</th>'
        f"<td>{base.scores[name]:.3f}</td><td>{tuned.scores[name]:.3f}</td></tr>"
        for name in base.scores
    )
    return (
        '<table class="scores"><thead><tr><th scope="col">score</th><th scope="col">base</th><th scope="col">tuned</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )
