"""CLIP metrics equal their formulas on transformers' forward pass, have exact gradients, and reject invalid input."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from acpo_dist.core.errors import RewardConfigError, RewardError
from acpo_dist.data.toy.world import captions, templates
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.objective.perceptual import clip_pixels
from acpo_dist.rewards import clip_backbone
from acpo_dist.rewards.clip_backbone import OPENAI_MEAN, OPENAI_STD, ClipBackbone, resize
from acpo_dist.rewards.clip_metrics import Aesthetic, ClipScore, PickScore
from acpo_dist.rewards.ipce import Ipce
from acpo_dist.rewards.training.tiny_clip import new_tiny_clip, save_tiny_clip
from acpo_dist.workers.reward.wire import pack, unpack
from acpo_dist.workers.reward.worker import RewardWorker

TEXT_METRICS = [ClipScore, PickScore, Ipce]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained CLIP folder."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    save_tiny_clip(path, new_tiny_clip())
    return path


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aesthetic head of two layers on 64 numbers."""
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    shapes = {"layers.0.weight": (8, 64), "layers.0.bias": (8,), "layers.2.weight": (1, 8), "layers.2.bias": (1,)}
    save_file({name: torch.randn(shape, generator=rng(len(name))) for name, shape in shapes.items()}, path)
    return path


def images(count: int, size: int = 32) -> Tensor:
    return 0.02 + 0.96 * torch.rand(count, 3, size, size, generator=rng(1))


def by_transformers(folder: Path, images: Tensor, texts: Sequence[str]) -> Any:
    """The complete CLIPModel's forward pass on images that need no resizing."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(list(texts), padding=True, truncation=True, return_tensors="pt")
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_MEAN, OPENAI_STD))
    with torch.no_grad():
        return model(pixel_values=(images - mean) / std, **tokens), model.logit_scale.exp().item()


# Formulas


def test_clipscore_is_that_of_transformers_own_forward(folder: Path):
    images_BCHW, prompts = images(6), captions()[:6]
    output, scale = by_transformers(folder, images_BCHW, [f"A photo depicts {prompt}" for prompt in prompts])
    cosine = output.logits_per_image.diagonal() / scale
    found = ClipScore(ClipScore.Config(weights=str(folder)))(images_BCHW, prompts)
    torch.testing.assert_close(found, 2.5 * cosine.clamp(min=0), rtol=0, atol=1e-5)


def test_pickscore_is_the_logit_of_the_model(folder: Path):
    images_BCHW, prompts = images(6), captions()[::8]
    output, _ = by_transformers(folder, images_BCHW, prompts)
    found = PickScore(PickScore.Config(weights=str(folder)))(images_BCHW, prompts)
    torch.testing.assert_close(found, output.logits_per_image.diagonal(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_the_aesthetic_head_is_applied_to_the_unit_vector(folder: Path, head: Path, activation: Any):
    images_BCHW = images(5)
    output, _ = by_transformers(folder, images_BCHW, ["a"])
    state = load_file(head)
    hidden = F.linear(output.image_embeds, state["layers.0.weight"], state["layers.0.bias"])
    hidden = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}[activation](hidden)
    wanted = F.linear(hidden, state["layers.2.weight"], state["layers.2.bias"])[:, 0]
    config = Aesthetic.Config(weights=str(head), clip=str(folder), activation=activation)
    torch.testing.assert_close(Aesthetic(config)(images_BCHW, [""] * 5), wanted, rtol=0, atol=1e-5)


def test_a_clipscore_below_zero_is_zero(folder: Path):
    metric = ClipScore(ClipScore.Config(weights=str(folder)))
    scores = metric(images(1).expand(48, -1, -1, -1), captions())
    cosine = metric.cosine(images(1).expand(48, -1, -1, -1), [f"A photo depicts {text}" for text in captions()])
    assert float(scores.min()) >= 0
    torch.testing.assert_close(scores, 2.5 * F.relu(cosine))


# Preparation


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (17, 40), (90, 70)], ids=str)
def test_resizing_is_pils_up_to_eight_bit_rounding(mode: str, size: tuple[int, int]):
    image = (templates()[100] * 255).round().to(torch.uint8)
    enlarged = image.repeat(1, 2, 2)[:, :50, :61]
    kind = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[mode]
    by_pil = Image.fromarray(enlarged.permute(1, 2, 0).numpy()).resize(size[::-1], kind)
    wanted = torch.frombuffer(bytearray(by_pil.tobytes()), dtype=torch.uint8).reshape(*size, 3).permute(2, 0, 1)
    found = 255 * resize(enlarged[None].float() / 255, size, mode)[0]
    # PIL rounds to 8 bits after each of its two passes.
    assert float((found - wanted).abs().max()) <= 1.5


def test_a_wide_image_is_cropped_to_its_middle(folder: Path):
    backbone = ClipBackbone(str(folder), name="x", texts=False)
    wide = torch.cat([torch.zeros(1, 3, 64, 32), torch.ones(1, 3, 64, 64), torch.zeros(1, 3, 64, 32)], -1)
    view = backbone.single_view(wide)
    assert view.shape == (1, 3, 32, 32)
    assert float(view[..., 2:-2].min()) > 0.99


# Gradient and batches


def kinds(folder: Path, head: Path) -> dict[str, Any]:
    return {
        "clip_score": ClipScore(ClipScore.Config(weights=str(folder))),
        "pick_score": PickScore(PickScore.Config(weights=str(folder))),
        "aesthetic": Aesthetic(Aesthetic.Config(weights=str(head), clip=str(folder))),
        "ipce": Ipce(Ipce.Config(weights=str(folder), patches=3)),
    }


@pytest.mark.parametrize("name", ["clip_score", "pick_score", "aesthetic", "ipce"])
def test_the_gradient_is_that_of_finite_differences(name: str, folder: Path, head: Path):
    metric = kinds(folder, head)[name]
    # An odd size, so that resizing and cropping are part of it; a prompt with a cosine above 0 for CLIPScore.
    images_BCHW = images(1, 41).expand(48, -1, -1, -1)
    prompt = captions()[int(metric(images_BCHW, captions()).argmax())]
    image = images_BCHW[:1].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(metric(image, [prompt]).sum(), image)
    # The steepest direction, and a random one scaled to a slope that float32 differences resolve.
    for direction in (gradient / gradient.norm(), gradient.sign() * torch.rand(gradient.shape, generator=rng(3))):
        direction = direction / direction.norm()
        step = 0.02
        with torch.no_grad():
            rise = metric((image + step * direction).clamp(0, 1), [prompt]) - metric(
                (image - step * direction).clamp(0, 1), [prompt]
            )
        assert float(rise) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=0.02)


@pytest.mark.parametrize("name", ["clip_score", "pick_score", "aesthetic", "ipce"])
def test_a_score_does_not_depend_on_the_batch(name: str, folder: Path, head: Path):
    metric, images_BCHW, prompts = kinds(folder, head)[name], images(16, 40), captions()[:16]
    with torch.no_grad():
        together = metric(images_BCHW, prompts)
        assert float(together.std()) > 1e-5
        for size in (1, 4):
            parts = [metric(images_BCHW[at : at + size], prompts[at : at + size]) for at in range(0, 16, size)]
            torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-4)


def test_nothing_of_the_model_is_trainable(folder: Path):
    model = ClipBackbone(str(folder), name="x", texts=False).model
    assert not model.training
    assert not any(parameter.requires_grad or parameter.dtype != torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("cut", ["image", "latent"])
def test_the_worker_gives_a_text_reward_the_gradient_of_the_whole_graph(cut: str, folder: Path):
    model = SdxlFamily.Config(path="toy-sdxl")
    config = PickScore.Config(weights=str(folder))
    values = torch.rand(4, 3, 32, 32, generator=rng(0)) if cut == "image" else torch.randn(4, 4, 8, 8, generator=rng(0))
    served = RewardWorker(config, model=model if cut == "latent" else None, cut=cut, wire_dtype="float32")
    answer = served.value_and_grad(pack(values, "float32"), captions()[:4])

    values = values.clone().requires_grad_(True)
    pixels = SdxlFamily.load_decoder(model, device="cpu").decode(values) if cut == "latent" else values
    scores = PickScore(config)(clip_pixels(pixels, ascend=True), captions()[:4])
    (wanted,) = torch.autograd.grad(scores.sum(), values)
    assert answer.scores == pytest.approx(scores.tolist(), abs=1e-5)
    error = (unpack(answer.gradient) - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert float(error.max()) < 1e-5


# Texts


def test_a_text_is_encoded_once_and_its_vector_does_not_depend_on_its_company(folder: Path, monkeypatch):
    backbone = ClipBackbone(str(folder), name="x", texts=True)
    encoded: list[str] = []
    encode = backbone.encode_texts
    monkeypatch.setattr(backbone, "encode_texts", lambda texts: encoded.extend(texts) or encode(texts))
    together = backbone.text_vectors([*captions()[:5], captions()[0]])
    again = backbone.text_vectors(captions()[:5])
    assert encoded == list(captions()[:5])
    assert torch.equal(together[:5], again) and torch.equal(together[5], together[0])
    alone = ClipBackbone(str(folder), name="x", texts=True).text_vectors([captions()[3]])
    torch.testing.assert_close(alone[0], together[3], rtol=0, atol=1e-6)
    assert not together.requires_grad


def test_the_text_cache_forgets_the_oldest(folder: Path, monkeypatch):
    monkeypatch.setattr(clip_backbone, "CACHED_TEXTS", 3)
    backbone = ClipBackbone(str(folder), name="x", texts=True)
    assert len(backbone.text_vectors(captions()[:5])) == 5
    backbone.text_vectors(captions()[2:3])
    backbone.text_vectors(captions()[9:10])
    encoded: list[str] = []
    tokenise = backbone.encode_texts
    monkeypatch.setattr(backbone, "encode_texts", lambda texts: encoded.extend(texts) or tokenise(texts))
    backbone.text_vectors([captions()[index] for index in (4, 2, 9)])
    assert encoded == []
    backbone.text_vectors([captions()[3]])
    assert encoded == [captions()[3]]


@pytest.mark.parametrize("kind", TEXT_METRICS)
def test_a_text_metric_without_prompts_is_refused(kind: Any, folder: Path):
    config = kind.Config(weights=str(folder))
    metric = kind(config)
    with pytest.raises(RewardError, match=f"`{config.name}` reads prompts, but 1 of 2 are empty"):
        metric(images(2), ["a red circle on a gray background", " "])
    with pytest.raises(RewardError, match="one prompt per image, found 1 for 2 images"):
        metric(images(2), ["a"])


# Images


@pytest.mark.parametrize("name", ["clip_score", "pick_score", "aesthetic", "ipce"])
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(3, 32, 32), "found shape"),
        (torch.rand(2, 1, 32, 32), "found shape"),
        (torch.rand(0, 3, 32, 32), "no images"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "found torch.uint8"),
        (torch.full((2, 3, 32, 32), 255.0), "found values from 255"),
        (torch.full((2, 3, 32, 32), math.nan), "2 of 2 images .* not finite"),
    ],
    ids=["rank", "channels", "empty", "uint8", "range", "nan"],
)
def test_what_is_no_image_is_refused_by_name(name: str, images: Tensor, words: str, folder: Path, head: Path):
    with pytest.raises(RewardError, match=f"`{name}`.*{words}"):
        kinds(folder, head)[name](images, ["a"] * len(images))


# Weights


@pytest.mark.parametrize("kind", TEXT_METRICS)
def test_a_folder_that_is_not_there_is_named(kind: Any, tmp_path: Path):
    config = kind.Config(weights=str(tmp_path / "absent"))
    assert config.unusable() is not None
    with pytest.raises(RewardConfigError, match=r"expected a folder with a .*CLIP at .*absent.*save_pretrained"):
        kind(config)


def test_a_hub_id_that_was_never_downloaded_fails_with_the_command_that_downloads_it():
    config = PickScore.Config()
    # HF_HUB_OFFLINE is set for all tests.
    assert "hf download yuvalkirstain/PickScore_v1" in (config.unusable() or "")
    with pytest.raises(RewardConfigError, match=r"HF_HUB_OFFLINE.*hf download yuvalkirstain/PickScore_v1"):
        PickScore(config)


def test_an_unreachable_hub_is_an_error_with_the_command_to_run(monkeypatch):
    import huggingface_hub

    def unreachable(*arguments: object, **options: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(RewardConfigError, match=r"downloaded: no route to host\. Run `hf download owner/name`"):
        ClipScore(ClipScore.Config(weights="owner/name"))


def test_a_folder_of_another_model_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(RewardConfigError, match="model_type `bert`, expected `clip`"):
        ClipScore(ClipScore.Config(weights=str(tmp_path)))


def test_weights_with_holes_are_refused_instead_of_filled_at_random(folder: Path, tmp_path: Path):
    copy = tmp_path / "holes"
    shutil.copytree(folder, copy)
    state = load_file(copy / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardConfigError, match=r"lack 1 tensors, such as `visual_projection\.weight`"):
        ClipScore(ClipScore.Config(weights=str(copy)))


def test_a_truncated_weights_file_is_refused(folder: Path, tmp_path: Path):
    copy = tmp_path / "short"
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RewardConfigError, match="no CLIP can be loaded"):
        ClipScore(ClipScore.Config(weights=str(copy)))


def test_a_model_without_its_tokenizer_is_refused_and_takes_one_from_elsewhere(folder: Path, tmp_path: Path):
    copy = tmp_path / "mute"
    shutil.copytree(folder, copy)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(RewardConfigError, match=r"no tokenizer for the model.*set `tokenizer`"):
        PickScore(PickScore.Config(weights=str(copy)))
    borrowed = PickScore(PickScore.Config(weights=str(copy), tokenizer=str(folder)))
    own = PickScore(PickScore.Config(weights=str(folder)))
    assert torch.equal(borrowed(images(2), captions()[:2]), own(images(2), captions()[:2]))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"0.weight": torch.zeros(1, 32), "0.bias": torch.zeros(1)}, "takes vectors of 32 numbers, .* gives 64"),
        ({"0.weight": torch.zeros(2, 64), "0.bias": torch.zeros(2)}, "does not hold an aesthetic head"),
        ({"0.weight": torch.zeros(1, 64)}, "does not hold an aesthetic head"),
        ({"other": torch.zeros(1)}, "does not hold an aesthetic head"),
    ],
    ids=["other model", "two numbers", "no bias", "other file"],
)
def test_a_head_that_does_not_fit_is_refused(state: dict[str, Tensor], words: str, folder: Path, tmp_path: Path):
    save_file(state, tmp_path / "head.safetensors")
    with pytest.raises(RewardConfigError, match=words):
        Aesthetic(Aesthetic.Config(weights=str(tmp_path / "head.safetensors"), clip=str(folder)))


def test_a_head_that_is_not_there_is_named(folder: Path, tmp_path: Path):
    with pytest.raises(RewardConfigError, match=r"no head at .*absent\.safetensors"):
        Aesthetic(Aesthetic.Config(weights=str(tmp_path / "absent.safetensors"), clip=str(folder)))
