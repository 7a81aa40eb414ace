"""Compare the reward pool with a plain pyiqa loop, and the two gradient cuts with each other.

    .venv/bin/python benchmarks/rewards.py [--quick] [--metric cnniqa ...] [--size 224 512 1024] [--replicas 1 2]

One JSON line per figure. `plain` is `create_metric` and one image at a time, with one torch thread and with one per
core, whichever is faster; `pool` is the same metric on Ray Serve. `ratio` is pool over plain. Weights are random and
local: they change the scores, not the time. `cut` compares what crosses to the pool per image (bytes both ways,
float16) and how long score and gradient take, the learner's own decoding and its backward included.
"""

import os

# Before torch is imported: two torch threads on contended cores are tens of times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from acpo_dist.config.load import load_config
from acpo_dist.core.types import RolloutHandle
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.workers.reward.wire import pack, unpack
from actors.reward.pool import ServeRewards, deploy

BATCH = 16
REPEATS = 3
"""Number of repetitions; the best counts, since other load on a machine only slows measurements."""
METRICS = ("cnniqa", "musiq", "piqe")
WITHOUT_GRADIENT = ("piqe",)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metric", nargs="+", default=list(METRICS), choices=METRICS)
    parser.add_argument("--size", type=int, nargs="+", default=[224, 512, 1024])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pixels", type=float, default=16e6, help="pixels per measurement, at least one batch")
    parser.add_argument("--quick", action="store_true", help="224 px and cnniqa alone")
    options = parser.parse_args()
    if options.quick:
        options.metric, options.size, options.pixels = ["cnniqa"], [224], 32e6
    ray.init(num_cpus=8, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, namespace="acpo")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        for metric in options.metric:
            weights = local_weights(metric, Path(folder))
            plain = {size: plain_speed(metric, weights, size, count(options, size)) for size in options.size}
            for replicas in options.replicas:
                with pool(metric, weights, replicas, cut="image") as rewards:
                    for size in options.size:
                        compare(
                            metric, size, replicas, plain[size], pool_speed(rewards, metric, size, count(options, size))
                        )
        cuts("cnniqa", local_weights("cnniqa", Path(folder)), options.size)
    ray.shutdown()


def count(options: argparse.Namespace, size: int) -> int:
    """Images of a measurement, a multiple of the batch."""
    return max(1, round(options.pixels / size**2 / BATCH)) * BATCH


def local_weights(name: str, folder: Path) -> Path | None:
    """Write a file with random weights, or return None if the metric has none."""
    from pyiqa.archs.cnniqa_arch import CNNIQA
    from pyiqa.archs.musiq_arch import MUSIQ

    build: dict[str, Callable[[], Any]] = {
        "cnniqa": lambda: CNNIQA(pretrained=None),
        "musiq": lambda: MUSIQ(pretrained=False),
    }
    if name not in build:
        return None
    torch.manual_seed(0)
    path = folder / f"{name}.pth"
    torch.save({"params": build[name]().state_dict()}, path)
    return path


def plain_speed(name: str, weights: Path | None, size: int, images: int) -> dict[str, float]:
    """Measure images per second of the plain loop: scores, and scores with gradients."""
    from pyiqa import create_metric

    local = {}
    if weights is not None:
        # MUSIQ reads a bare state dict, CNNIQA one below the key `params`.
        path = weights.with_suffix(".bare.pth") if name == "musiq" else weights
        if name == "musiq":
            torch.save(torch.load(weights, weights_only=True)["params"], path)
        local = {"pretrained_model_path": str(path)}
    with contextlib.redirect_stdout(sys.stderr):
        score = create_metric(name, device=torch.device("cpu"), **local)
        loss = (
            None if name in WITHOUT_GRADIENT else create_metric(name, device=torch.device("cpu"), as_loss=True, **local)
        )
    images_BCHW = random_images(min(images, 2 * BATCH), size).float() / 255

    def gradients() -> None:
        for image in images_BCHW:
            values = image[None].clone().requires_grad_(True)
            loss(values).sum().backward()

    metrics: dict[str, list[float]] = {"images": [], "gradients": []}
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for _ in range(REPEATS):
            metrics["images"].append(len(images_BCHW) / seconds(lambda: [score(image[None]) for image in images_BCHW]))
            if loss is not None:
                metrics["gradients"].append(len(images_BCHW) / seconds(gradients))
    torch.set_num_threads(1)
    return {kind: max(found) for kind, found in metrics.items() if found}


@contextlib.contextmanager
def pool(metric: str, weights: Path | None, replicas: int, *, cut: str) -> Iterator[ServeRewards]:
    """Start the pool with one metric, as a run does."""
    entry = {"type": "pyiqa", "metric": metric, "name": metric, "weights": str(weights) if weights else None}
    role = ("judges", "train") if metric in WITHOUT_GRADIENT else ("train", "judges")
    rewards = {role[0]: [entry], role[1]: [{"type": "sharpness"}] if metric in WITHOUT_GRADIENT else []}
    config = load_config(
        "toy_sdxl",
        [
            *(f"rewards.{key}={json.dumps(value)}" for key, value in rewards.items()),
            f"rewards.cut={cut}", f"rewards.replicas={replicas}", "rewards.cpus_per_replica=1", "tracking.mlflow=false",
        ],
    )  # fmt: skip
    served = deploy(config, f"acpo-{uuid.uuid4().hex[:8]}")
    try:
        yield served
    finally:
        served.close()


def pool_speed(rewards: ServeRewards, metric: str, size: int, images: int) -> dict[str, float]:
    """Measure images per second of the pool: scores, and scores with gradients."""
    batches = random_images(images, size).split(BATCH)
    # Copies: a part of a larger tensor would travel with all of it.
    handles = [
        RolloutHandle(
            sample_ids=tuple(f"{index}/{row}" for row in range(len(batch))), prompts=("",) * len(batch),
            policy_version=0, schedule_id="", payload=(None, ray.put(batch.clone())),
        )
        for index, batch in enumerate(batches)
    ]  # fmt: skip
    rewards.score(handles[:1], [metric])
    metrics = {"images": images / min(seconds(lambda: rewards.score(handles, [metric])) for _ in range(REPEATS))}
    if metric not in WITHOUT_GRADIENT:
        sent = [pack(batch.float() / 255, "float16") for batch in batches]

        def gradients() -> None:
            asked = [rewards.client.submit(metric, part, ("",) * len(part.data)) for part in sent]
            for answer in asked:
                answer.result()

        metrics["gradients"] = images / min(seconds(gradients) for _ in range(REPEATS))
    return metrics


def compare(metric: str, size: int, replicas: int, plain: dict[str, float], found: dict[str, float]) -> None:
    """Print plain, pool and ratio."""
    for kind, speed in found.items():
        line(
            metric=metric, size=size, replicas=replicas, kind=f"{kind}_per_s", plain=round(plain[kind], 2),
            pool=round(speed, 2), ratio=round(speed / plain[kind], 2),
        )  # fmt: skip


def cuts(metric: str, weights: Path | None, sizes: list[int]) -> None:
    """Print bytes and time per image of both cuts, including the learner's share."""
    decoder = SdxlFamily.load_decoder(SdxlFamily.Config(path="toy-sdxl"), device="cpu")
    with torch.no_grad():
        factor = decoder.decode(torch.zeros(1, 4, 8, 8)).shape[-1] // 8
    for cut in ("latent", "image"):
        with pool(metric, weights, 1, cut=cut) as rewards:
            for size in sizes:
                latents = torch.randn(1, 4, size // factor, size // factor, generator=torch.Generator().manual_seed(0))

                def ask(latents: Tensor = latents, cut: str = cut, rewards: ServeRewards = rewards) -> int:
                    clean = latents.clone().requires_grad_(True)
                    sent = pack(clean if cut == "latent" else decoder.decode(clean), "float16")
                    answer = rewards.client.submit(metric, sent, ("",)).result()
                    if cut == "image":
                        torch.autograd.grad(decoder.decode(clean), clean, unpack(answer.gradient))
                    return sent.nbytes + answer.gradient.nbytes

                travelled = ask()
                line(
                    kind="cut", cut=cut, metric=metric, size=size, decoder=f"toy-sdxl, {factor} px per latent",
                    bytes=travelled, seconds=round(min(seconds(ask) for _ in range(3)), 4),
                )  # fmt: skip


def random_images(number: int, size: int) -> Tensor:
    """uint8 noise (number, 3, size, size)."""
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def seconds(work: Callable[[], Any]) -> float:
    """Measure the duration of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def line(**metrics: Any) -> None:
    """One JSON line."""
    sys.stdout.write(json.dumps(metrics) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
