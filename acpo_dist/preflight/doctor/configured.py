"""Check a configuration on this machine: its model, data and rewards, each opened as in a run."""

import time
from collections.abc import Iterator

import torch

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import AcpoError, ModelError
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.data.captions import CAPTION_COLUMNS
from acpo_dist.data.encoded import EncodedImages
from acpo_dist.data.images import load_images
from acpo_dist.data.pairs import PairSet
from acpo_dist.data.prompts import run_prompts
from acpo_dist.models.loading import looks_local
from acpo_dist.preflight.doctor.finding import Check, Finding
from acpo_dist.preflight.doctor.storage import check_runs
from acpo_dist.preflight.plan.plan import make_plan
from acpo_dist.training.base_check import FATAL, describe_problems
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.local import LocalRollouts, default_device
from acpo_dist.training.run import long_prompts, model_notes
from acpo_dist.training.run_folder import RESOLVED
from acpo_dist.workers.learner.checkpoint import CheckpointStore
from acpo_dist.workers.reward.canary import Canary
from acpo_dist.workers.reward.wire import pack, unpack
from acpo_dist.workers.reward.worker import RewardWorker

_GIB = 2**30
_BASE_SAMPLES = 8
_SAVED_BYTES = 16
"""Bytes per trainable weight in a checkpoint: the weight, its average and Adam's two moments in float32."""


def check_model(config: Config) -> Iterator[Finding]:
    """Check that the model is complete on this machine; nothing is downloaded."""
    family, model = resolve("model", MODELS, config.model.type), config.model
    family.check(model)
    if model.path == "train":
        yield Finding("model", "note", f"a `{model.type}` that the run trains first")
        return
    offline = model.model_copy(update={"offline": True}) if "offline" in type(model).model_fields else model
    started = time.monotonic()
    try:
        # Only the decoder is loaded: it goes through the same loader as the other parts, and is comparatively small.
        family.load_decoder(offline, device="cpu")
        if not looks_local(model.path) and model.pixel_space:
            # Such a decoder reads no file, so the pipeline itself must be in the cache.
            family.load(offline, device="cpu", trainable=False)
    except ModelError as error:
        if looks_local(model.path) or model.path.startswith("toy-"):
            raise
        advice = f"The run downloads it when it starts; `hf download {model.path}` downloads it now."
        yield Finding("model", "note", f"not on this disk: {error}", advice)
        return
    yield Finding(
        "model", "ok", f"`{model.path}` is available; its decoder loads in {time.monotonic() - started:.1f} s"
    )
    for note in model_notes(config):
        yield Finding("model", "note", note)


def check_plan(config: Config) -> Iterator[Finding]:
    """Report the warnings of `acpo plan`, and the free space for checkpoints."""
    try:
        plan = make_plan(config)
    except ModelError:
        # Already reported by the check of the model.
        yield Finding("plan", "note", "not computed without the model")
        yield from check_runs(config.run_dir)
        return
    need = ", ".join(f"{name} {amount:.1f} GiB" for name, amount in plan.needed_gib.items())
    yield Finding("plan", "ok", f"{plan.device.name}: {need} per device")
    for text in plan.warnings:
        yield Finding("plan", "warning" if text.startswith("out of memory") else "note", text)
    # One more than is kept, because the new checkpoint is complete before the oldest is deleted.
    saved = plan.parameters["trainable"] * _SAVED_BYTES * (config.checkpoint.keep + 1) / _GIB
    yield from check_runs(config.run_dir, max(1.0, 1.2 * saved))


def check_folder(config: Config) -> Iterator[Finding]:
    """Check whether the run folder is free, and report its content."""
    if not (config.run_dir / RESOLVED).is_file():
        return
    newest = CheckpointStore(config.run_dir / "checkpoints", keep=config.checkpoint.keep).newest()
    what = f"a run with a checkpoint of {newest.iteration} iterations" if newest else "a run that saved nothing"
    advice = "`acpo train ... --resume auto` continues it; another run.name or run.seed starts a new run."
    yield Finding("run folder", "note", f"{config.run_dir} holds {what}", advice)


def data_checks(config: Config) -> Iterator[tuple[str, Check]]:
    """Yield the checks of prompts, images and pairs, each by itself: every missing file is named."""
    if config.data.prompts != "none":
        yield "prompts", lambda: _check_prompts(config)
    if config.data.path is not None:
        yield "images", lambda: _check_images(config)
    if config.data.pairs is not None:
        yield "pairs", lambda: _check_pairs(config)


def _check_prompts(config: Config) -> Iterator[Finding]:
    prompts = run_prompts(config)
    yield Finding("prompts", "ok", f"{len(prompts)} in `{config.data.prompts}`")
    if long := long_prompts(config, prompts):
        yield Finding("long prompts", "warning" if config.model.long_prompts == "cut" else "note", long)


def _check_images(config: Config) -> Iterator[Finding]:
    assert config.data.path is not None
    image = load_images(config.data.path, config.data.image_column, 1, None)
    size = " x ".join(str(side) for side in image.tensor.shape[-2:])
    yield Finding("images", "ok", f"{config.data.path}, the first is {size}")
    if config.model.conditional and getattr(getattr(config.algorithm, "anchor", None), "source", "") == "data":
        yield _captioned(config)


def _check_pairs(config: Config) -> Iterator[Finding]:
    assert config.data.pairs is not None
    counts = PairSet(config.data.pairs, size=1).index(absolute=config.data.absolute_pairs).counts
    yield Finding("pairs", "ok", ", ".join(f"{name} {count}" for name, count in counts.items()))


def _captioned(config: Config) -> Finding:
    """Count the captions of the images of `data.path`."""
    data = config.data
    assert data.path is not None
    columns = (data.caption_column,) if data.caption_column else CAPTION_COLUMNS
    captions = EncodedImages(data.path, image_column=data.image_column, caption_columns=columns).captions()
    have = sum(1 for caption in captions if caption)
    text = f"{have} of {len(captions)} images have a caption"
    if have == len(captions):
        return Finding("captions", "ok", text)
    advice = "Images without one are not used: add a .txt file beside each, metadata.jsonl, or set data.caption_column."
    return Finding("captions", "warning" if have else "failed", text, advice)


def check_base_samples(config: Config) -> Iterator[Finding]:
    """Check samples of the base model as at the start of a run, if a few of them take only seconds."""
    device = default_device()
    quick = config.model.path.startswith("toy-") or (device == "cuda" and looks_local(config.model.path))
    if config.model.path == "train" or not quick:
        yield Finding("base samples", "note", "checked by the run before training; its samples/base.png shows them")
        return
    prompts = run_prompts(config)
    groups = fixed_groups(config, prompts, _BASE_SAMPLES, stream="doctor")
    rollouts = LocalRollouts(config, device=device)
    handles = rollouts.generate(groups)
    images = rollouts.images(handles, [plan.sample_id for group in groups for plan in group.samples])
    problems = describe_problems(images, rollouts.final_latents(groups[:4], rollouts.trajectory()), config)
    for name, text in problems.items():
        found, _, advice = text.partition("; ")
        yield Finding("base samples", "failed" if name in FATAL else "warning", found, advice)
    if not problems:
        yield Finding("base samples", "ok", f"{_BASE_SAMPLES} samples look like images (no noise, no single colour)")


def check_rewards(config: Config) -> Iterator[Finding]:
    """Check that every reward and judge scores the canary image, and that gradient-based ones return the gradient."""
    training = {entry.name for entry in config.rewards.train}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for entry in (*config.rewards.train, *config.rewards.judges):
        role = "reward" if entry.name in training else "judge"
        if getattr(entry, "weights", None) == "train":
            yield Finding(f"{role} `{entry.name}`", "note", "trained by the run before the first iteration")
            continue
        try:
            latent = entry.space == "latent"
            worker = RewardWorker(
                entry, model=config.model if latent else None, cut="latent" if latent else "image",
                wire_dtype="float32", device=device,
            )  # fmt: skip
            known = Canary(worker)
            started = time.monotonic()
            known.check()
            found = f"scores the canary image {known.reference:.4g} in {time.monotonic() - started:.2f} s on {device}"
            if role == "reward" and config.algorithm.pathwise:
                sample = pack(known.image if latent else known.image.float() / 255, "float32")
                gradient = unpack(worker.value_and_grad(sample, ("a photograph",)).gradient)
                found += f", gradient of norm {float(gradient.norm()):.3g}"
        except Exception as error:
            # Errors of libraries, or a lack of device memory, must not end the checks of the other metrics either.
            said = str(error) if isinstance(error, AcpoError) else f"{type(error).__name__}: {error}"
            yield Finding(f"{role} `{entry.name}`", "failed", said)
            continue
        yield Finding(f"{role} `{entry.name}`", "ok", found)
