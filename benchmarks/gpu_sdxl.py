"""A model at full size with random weights: rollouts and ACPO steps per second, peak memory, beside plain diffusers.

    .venv/bin/python benchmarks/gpu_sdxl.py [--out FILE.json] [--folder DIR] [--batch 8] [--micro 4] [--skip-full]
    .venv/bin/python benchmarks/gpu_sdxl.py --family sd3      # or sd15, zimage, flux2_klein; the default is sdxl
    .venv/bin/python benchmarks/gpu_sdxl.py --tiny            # the same program on the toy, on the CPU

Further arguments are overrides of the family's configuration, such as model.image_size=512. Prints a table and writes
JSON. All rows of a run have the same prompts, resolution and type. Random weights do as much arithmetic as trained
ones; their images are noise, so this says nothing of quality. Meant to end within nine minutes on an H200 for SDXL.
"""

import os

# Before torch is imported: two torch threads on contended cores are tens of times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler

from acpo_dist.config.load import load_config
from acpo_dist.config.schema import Config
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.types import Normaliser, RewardTerm, TrainTask
from acpo_dist.data.prompts import sample_prompts
from acpo_dist.data.toy.world import captions
from acpo_dist.models.architectures import TRANSFORMERS
from acpo_dist.models.loading import resolve_path
from acpo_dist.models.sd3 import T5_PARTS
from acpo_dist.models.training.random_model import write_random_pipeline
from acpo_dist.preflight.plan.plan import make_plan
from acpo_dist.training.local import LocalLearner, LocalRewards, LocalRollouts, learner_spec

CONFIGS = {
    "sdxl": "sdxl_lora", "sd15": "sd15_lora", "sd3": "sd35_lora", "zimage": "zimage_lora",
    "flux2_klein": "flux2_klein_lora",
}  # fmt: skip
"""Configuration by family."""
TOYS = {"sdxl": "toy-sdxl", "sd15": "toy-sd15", "sd3": "toy-flow"}


@dataclass
class Row:
    """One measured setting."""

    name: str
    samples: int
    seconds: float
    peak_gib: float
    teraflops_per_sample: float
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds

    def to_mapping(self, peak_tflops: float) -> dict[str, Any]:
        """Plain data, with TFLOP/s and their share of the measured peak."""
        reached = self.rate * self.teraflops_per_sample
        return asdict(self) | {"per_second": self.rate, "tflops": reached, "share_of_peak": reached / peak_tflops}


class Bench:
    """One device, one model, the rows so far."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        """Take the options and the model's folder."""
        self.options, self.folder, self.rows = options, folder, list[Row]()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.float32 if options.tiny else torch.bfloat16
        self.peak_tflops = measured_peak(self.device, self.dtype)

    def config(self, steps: int, *overrides: str) -> Config:
        """The family's configuration on the folder, with a small reward and one group of samples per iteration."""
        name = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        batch = self.options.batch
        # Flow models spend most of their steps at high noise: with two steps the last one starts at sigma 0.88.
        late = (
            ["sampler.k_max=null", "sampler.t_max=0.9"]
            if self.options.family in TRANSFORMERS
            else ["sampler.t_max=0.5"]
        )
        return load_config(
            CONFIGS[self.options.family],
            [
                f"model.path={self.folder}",
                "model.variant=null",
                f"model.dtype={name}",
                f"model.vae_dtype={name}",
                *(["model.image_size=32"] if self.options.tiny else []),
                "model.memory.embedding_cache=null",
                "model.memory.free_text_encoders=true",
                f"learner.precision={name}",
                f"sampler.num_steps={steps}",
                f"rollout.batch_size={batch}",
                f"rollout.prompts_per_iteration={batch}",
                "data.prompts=toy",
                "rewards.train=[{type: two_stream}]",
                "rewards.judges=[]",
                *late,
                f"learner.micro_batch={self.options.micro}",
                f"learner.global_batch={batch}",
                *self.options.overrides,
                *overrides,
            ],
        )

    def timed(self, name: str, samples: int, teraflops: float, run: Callable[[], dict[str, float]]) -> Row:
        """Run once to warm up, then once for the record."""
        run()
        self._settle(reset=True)
        started = time.perf_counter()
        phases = run()
        self._settle()
        row = Row(name, samples, time.perf_counter() - started, self._peak(), teraflops, phases)
        self.rows.append(row)
        say(f"{row.name:<34}{row.rate:9.3f}/s{row.peak_gib:9.1f} GiB")
        return row

    def _settle(self, *, reset: bool = False) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            if reset:
                torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else float("nan")

    def diffusers(self, steps: int) -> None:
        """Plain diffusers: the pipeline's own call; Euler for Stable Diffusion, the own scheduler of a flow model."""
        config = self.config(steps)
        family, guidance = resolve("model", MODELS, self.options.family), config.sampler.guidance_scale
        missing = dict.fromkeys(T5_PARTS) if self.options.family == "sd3" else {}
        pipeline: Any = family.pipeline.from_pretrained(self.folder, dtype=self.dtype, **missing).to(self.device)
        call = {"guidance_scale": guidance}
        if self.options.family in TRANSFORMERS:
            call = family.call_arguments(config.model, guidance)
        else:
            pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        size, batch = config.model.image_size, self.options.batch
        flops = make_plan(config, device="h200").teraflops["rollout"]

        def run() -> dict[str, float]:
            pipeline(
                prompt=list(captions()[:batch]),
                num_inference_steps=steps,
                height=size,
                width=size,
                output_type="np",
                generator=torch.Generator().manual_seed(0),
                **call,
            )
            return {}

        self.timed(f"diffusers, {steps} steps", batch, flops, run)

    def rollouts(self, steps: int, name: str) -> None:
        """Our rollout worker."""
        config = self.config(steps)
        pool = LocalRollouts(config, device=self.device)
        groups = sample_prompts(
            captions(), iteration=0, run_seed=0, num_prompts=self.options.batch, samples_per_prompt=1
        )
        flops = make_plan(config, device="h200").teraflops["rollout"]

        def run() -> dict[str, float]:
            pool.generate(groups)
            return {}

        self.timed(name, self.options.batch, flops, run)

    def training(self, name: str, steps: int, *overrides: str) -> None:
        """A whole ACPO iteration: rollout, scores, one gradient step with the anchor, weights to the rollouts."""
        config = self.config(steps, *overrides)
        plan = make_plan(config, device="h200")
        rollouts, rewards = LocalRollouts(config, device=self.device), LocalRewards(config, device=self.device)
        learner = LocalLearner(learner_spec(config), rewards, device=self.device)
        learner.start(None)
        term = RewardTerm(name="two_stream", weight=1.0, normaliser=Normaliser(mean=0.5, std=0.2, sign=1))
        version = 0

        def run() -> dict[str, float]:
            nonlocal version
            clock, phases = time.perf_counter(), {}

            def lap(phase: str) -> None:
                nonlocal clock
                self._settle()
                phases[phase] = time.perf_counter() - clock
                clock = time.perf_counter()

            groups = sample_prompts(
                captions(), iteration=version, run_seed=0, num_prompts=self.options.batch, samples_per_prompt=1
            )
            ids = tuple(plan.sample_id for group in groups for plan in group.samples)
            handles = rollouts.generate(groups)
            lap("rollout")
            rewards.score(handles, ["two_stream"])
            lap("reward")
            task = TrainTask(
                iteration=version,
                policy_version=version,
                sample_ids=ids,
                weights=dict.fromkeys(ids, 1.0),
                anchor_weight=1.0,
                learning_rate=config.learner.learning_rate,
                rewards=(term,),
            )
            learner.train(handles, task)
            lap("learn")
            version += 1
            rollouts.load(learner.export(version))
            lap("sync")
            return phases

        flops = plan.teraflops["rollout"] + plan.teraflops["learner"] + plan.teraflops["reward_gradient"]
        self.timed(name, self.options.batch, flops, run)
        learner.close()


def measured_peak(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product on this device."""
    size = 8192 if device == "cuda" else 512
    left = torch.randn(size, size, device=device).to(dtype)
    rounds = 20 if device == "cuda" else 5
    for counted in (3, rounds):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(counted):
            torch.matmul(left, left)
        if device == "cuda":
            torch.cuda.synchronize()
    return 2 * size**3 * rounds / (time.perf_counter() - started) / 1e12


def say(text: str) -> None:
    """One line of the table."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the family's configuration")
    parser.add_argument("--family", choices=list(CONFIGS), default="sdxl", help="value of model.type")
    parser.add_argument("--tiny", action="store_true", help="the embedded toy at 32 px in float32, few steps")
    parser.add_argument("--folder", type=Path, default=None, help="where the random model is, or is to be written")
    parser.add_argument("--batch", type=int, default=8, help="samples per iteration")
    parser.add_argument("--micro", type=int, default=4, help="learner.micro_batch of LoRA; full tuning takes half")
    parser.add_argument("--skip-full", action="store_true", help="leave out full fine-tuning")
    parser.add_argument("--out", type=Path, default=None, help="write JSON there")
    options = parser.parse_args()
    if options.tiny:
        options.batch, options.micro = 2, 2
        if options.folder is None and options.family not in TOYS:
            parser.error(f"no toy of {options.family} is embedded: --folder must name a small one")
    elif not torch.cuda.is_available():
        parser.error("no CUDA device found; --tiny runs on the CPU")
    long, short = (3, 2) if options.tiny else (20, 10)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(options.folder) if options.folder else TOYS.get(options.family, "")
        if not options.tiny:
            target = options.folder or Path(scratch) / options.family
            folder = str(write_random_pipeline(target, options.family, device="cuda"))
            say(f"random weights: {time.perf_counter() - started:.0f} s")
        report = measure(Bench(options, resolve_path(folder)), long, short)
    report["seconds"] = time.perf_counter() - started
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    say(f"{report['seconds']:.0f} s in all; measured peak {report['peak_tflops']:.1f} TFLOP/s ({report['dtype']})")


def measure(bench: Bench, long: int, short: int) -> dict[str, Any]:
    """All rows. Each frees its model before the next one loads."""
    say(f"{'':<34}{'samples':>11}{'peak memory':>13}")
    steps: list[Callable[[], None]] = [
        lambda: bench.diffusers(long),
        lambda: bench.rollouts(long, f"rollout, {long} steps"),
        lambda: bench.rollouts(short, f"rollout, {short} steps (VRG)"),
        lambda: bench.training(f"ACPO, LoRA, {long} steps", long),
        lambda: bench.training(f"ACPO, LoRA, {short} steps (VRG)", short),
    ]
    if not bench.options.skip_full:
        full = ["model.tuning.method=full", "model.memory.anchor_dtype=bfloat16", "learner.learning_rate=1e-6"]
        full.append(f"learner.micro_batch={max(1, bench.options.micro // 2)}")
        steps.append(lambda: bench.training(f"ACPO, full, {long} steps", long, *full))
    for step in steps:
        step()
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return {
        "family": bench.options.family,
        "device": torch.cuda.get_device_name() if bench.device == "cuda" else "cpu",
        "torch": torch.__version__, "dtype": str(bench.dtype).removeprefix("torch."),
        "batch": bench.options.batch, "micro_batch": bench.options.micro, "peak_tflops": bench.peak_tflops,
        "rows": [row.to_mapping(bench.peak_tflops) for row in bench.rows],
    }  # fmt: skip


if __name__ == "__main__":
    main()
