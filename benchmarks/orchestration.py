"""What orchestration costs: the toy in one process, on Ray in turns and on Ray overlapped; and the driver at scale.

    .venv/bin/python benchmarks/orchestration.py pairs [--rounds 5] [--iterations 3] [--cores] [KEY=VALUE ...]
    .venv/bin/python benchmarks/orchestration.py control [--workers 8 32 128 512] [--chunk-s 5.75] [--chunks 2]
    .venv/bin/python benchmarks/orchestration.py call [--calls 512] [--rounds 5]
    .venv/bin/python benchmarks/orchestration.py transfer [--workers 64] [--megabytes 186]

`pairs` calibrates the same training three ways, and then runs some iterations of each in turns: seconds per iteration
by phase (medians), CPU seconds of all processes, and the ratio of the overlapped run to the one in turns (median over
rounds). `--cores` gives the rollout worker one core, and learner and reward replicas another, which their iterations
share about equally.

`control` drives simulated rollout workers with the code that drives real ones: each sleeps for a chunk's planned time
and returns references to objects of an SDXL chunk's size. Workers share four processes, so that hundreds fit on one
machine. Per number of workers: wall seconds of an iteration beyond the planned ones, and CPU seconds of the driver.

`call` times the driver's part of one call of an idle actor, with more and more of a chunk's arguments: CPU microseconds
of the driver's thread, the least of some rounds.

`transfer` gives one adapter to many workers on this machine: seconds to store it once, and until all have read it.

Each prints one JSON line per measurement.
"""

import os

# Before torch is imported: two torch threads on contended cores are tens of times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from acpo_dist.cli.backend import ports_for
from acpo_dist.config.load import load_config
from acpo_dist.core.types import RolloutHandle, SamplePlan
from acpo_dist.data.prompts import run_prompts, sample_prompts
from acpo_dist.data.toy.world import captions
from acpo_dist.tracking.composite import CompositeTracker
from acpo_dist.tracking.console import Console
from acpo_dist.training.context import RunContext
from acpo_dist.training.loop import Trainer
from acpo_dist.training.run_folder import open_run
from acpo_dist.workers.rollout.chunks import chunks_of

ON_RAY = [
    "cluster.backend=ray", "rollout.cpus_per_worker=0.1", "rewards.cpus_per_replica=0.1", "learner.cpus_per_rank=0.1",
]  # fmt: skip
ARMS = {
    "one process": ["cluster.backend=local"],
    "ray, in turns": ON_RAY,
    "ray, overlapped": [*ON_RAY, "pipeline.max_staleness=1"],
}
CORES = {"ray::RolloutActor": 0, "ray::ServeReplica": 1, "ray::LearnerActor": 1}
"""Core of a worker, by the start of its process title. Gradients of rewards are part of the learner's work."""
PHASES = ("rollout", "reward", "learn", "probe", "guard", "sync")
SHOWN = (*(f"time/{phase}" for phase in PHASES), "time/iteration", "idle/rollout", "idle/learner", "idle/reward")
HOSTS = 4
CHUNK = 8
"""Samples of a simulated chunk."""
CHUNK_BYTES = {"latents": 5 * 8 * 4 * 128 * 128 * 4, "images": 8 * 3 * 1024 * 1024}
"""Bytes of an SDXL chunk of eight samples: x_0 and four late states in float32, images in uint8."""


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    pairs = commands.add_parser("pairs")
    pairs.add_argument("--rounds", type=int, default=5)
    pairs.add_argument("--iterations", type=int, default=3)
    pairs.add_argument("--config", default="toy_sdxl")
    pairs.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    pairs.add_argument("--cores", action="store_true", help="bind the roles to two cores")
    pairs.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    pairs.set_defaults(run=measure_pairs)
    control = commands.add_parser("control")
    control.add_argument("--workers", type=int, nargs="+", default=[8, 32, 128, 512])
    control.add_argument("--chunk-s", type=float, default=5.75)
    control.add_argument("--chunks", type=int, default=2, help="chunks per worker and iteration")
    control.set_defaults(run=measure_control)
    call = commands.add_parser("call")
    call.add_argument("--calls", type=int, default=512)
    call.add_argument("--rounds", type=int, default=5)
    call.set_defaults(run=measure_call)
    transfer = commands.add_parser("transfer")
    transfer.add_argument("--workers", type=int, default=64)
    transfer.add_argument("--megabytes", type=float, default=186)
    transfer.set_defaults(run=measure_transfer)
    options = parser.parse_args()
    options.run(options)


def measure_pairs(options: argparse.Namespace) -> None:
    """Run some iterations of every arm in turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.arms}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trainers = {
            name: stack.enter_context(_trainer(options, root / str(number), [*ARMS[name], *options.overrides]))
            for number, name in enumerate(options.arms)
        }
        if options.cores:
            _bind()
        for number in range(options.rounds):
            for name, trainer in trainers.items():
                found[name].append(_iterate(trainer, options.iterations))
                _say(round=number, arm=name, **found[name][-1])
    turns, ahead = found.get("ray, in turns", []), found.get("ray, overlapped", [])
    if turns and ahead:
        ratios = [two["time/iteration"] / one["time/iteration"] for one, two in zip(turns, ahead, strict=True)]
        _say(ratio_median=round(median(ratios), 4), ratios=[round(ratio, 4) for ratio in ratios])
    for name, rows in found.items():
        _say(arm=name, **{key: round(median(row[key] for row in rows), 4) for key in rows[0]})


@contextmanager
def _trainer(options: argparse.Namespace, root: Path, overrides: list[str]) -> Iterator[Trainer]:
    """Calibrate a run, without trackers, and close its workers at the end."""
    # No iteration is the last one, for which nothing is drawn ahead.
    config = load_config(options.config, [f"run.dir={root}", "run.iterations=100000", *overrides])
    folder, _ = open_run(config, None)
    with ports_for(config.cluster.backend)(config, CompositeTracker([])) as ports:
        context = RunContext(
            config=config, ports=ports, folder=folder, prompts=run_prompts(config), console=Console(quiet=True)
        )
        trainer = Trainer(context)
        try:
            yield trainer
        finally:
            trainer.close()


def _iterate(trainer: Trainer, iterations: int) -> dict[str, float]:
    """Return medians over iterations after a first one, during which samples of another arm may still be drawn."""
    trainer.iterate()
    before = _cpu_seconds()
    rows = [trainer.iterate() for _ in range(iterations)]
    found = {key: median(row[key] for row in rows) for key in SHOWN if key in rows[0]}
    found["cpu_s"] = (_cpu_seconds() - before) / iterations
    return {key: round(value, 4) for key, value in found.items()}


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and its descendants."""
    top, total = psutil.Process(), 0.0
    for one in (top, *top.children(recursive=True)):
        times = one.cpu_times()
        total += times.user + times.system
    return total


def _bind() -> None:
    """Bind all workers, which Ray names in their process titles, to their cores."""
    for one in psutil.Process().children(recursive=True):
        title = " ".join(one.cmdline()[:1])
        for start, core in CORES.items():
            for thread in one.threads() if title.startswith(start) else ():
                os.sched_setaffinity(thread.id, {core})


def measure_control(options: argparse.Namespace) -> None:
    """Time the driver with more and more simulated workers."""
    import ray

    _start(ray)
    for count in options.workers:
        tasks, planned = options.chunks * count, options.chunks * options.chunk_s
        groups = sample_prompts(
            captions(), iteration=0, run_seed=0, num_prompts=tasks * CHUNK, samples_per_prompt=1, mix=None
        )
        workers, chunks = _pool(ray, count), chunks_of(groups, CHUNK)
        _draw(ray, workers, chunks[:count], 0.0)
        cpu, whole, started = time.thread_time(), time.process_time(), time.monotonic()
        _draw(ray, workers, chunks, options.chunk_s)
        wall, cpu, whole = time.monotonic() - started, time.thread_time() - cpu, time.process_time() - whole
        _say(
            workers=count, tasks=tasks, planned_s=planned, wall_s=round(wall, 3), driver_cpu_s=round(cpu, 3),
            process_cpu_s=round(whole, 3), beyond_plan=round(wall / planned - 1, 4),
            driver_share=round(cpu / planned, 4),
        )  # fmt: skip
    ray.shutdown()


def _draw(ray: Any, workers: Any, chunks: Sequence[tuple[SamplePlan, ...]], chunk_s: float) -> None:
    """Give chunks to simulated workers as `RayRollouts.generate` gives them to real ones."""
    from actors.rollout import Policy, fields_of

    # A task names the weights and does not contain them.
    policy = ray.put(Policy(version=1, bundle=(ray.put(b""),)))

    def submit(actor: Any, index: int) -> tuple[Any, Any]:
        # Chunks take 2 % more or less than planned.
        seconds = chunk_s * (0.98 + 0.04 * ((index * 7919) % 101) / 100)
        meta, latents, images = actor.generate(fields_of(chunks[index]), policy, seconds)
        return meta, (latents, images)

    workers.spread([chunk[0].sample_id for chunk in chunks], submit, what="generate")


class _Host:
    """Executes calls of many simulated workers at once."""

    def __init__(self) -> None:
        import ray

        self._objects = [ray.put(np.zeros(size, np.uint8)) for size in CHUNK_BYTES.values()]

    def generate(
        self, chunk: Sequence[Mapping[str, Any]], policy: Any, seconds: float
    ) -> tuple[Any, list[Any], list[Any]]:
        from actors.worker_pool import Answer

        time.sleep(seconds)
        handle = RolloutHandle(
            sample_ids=tuple(plan["sample_id"] for plan in chunk), prompts=tuple(plan["prompt"] for plan in chunk),
            policy_version=policy.version, schedule_id="simulated", payload=None,
        )  # fmt: skip
        return Answer(f"process {os.getpid()}", handle), [self._objects[0]], [self._objects[1]]

    def ready(self) -> Any:
        from actors.worker_pool import Answer

        return Answer(f"process {os.getpid()}", None)

    def ignore(self, *arguments: Any) -> tuple[None, None, None]:
        return None, None, None

    def take(self, bundle: list[Any]) -> int:
        import ray

        found: Any = ray.get(bundle[0])
        return found.nbytes


class _Worker:
    """One simulated worker; its calls run in a process that it shares."""

    def __init__(self, host: Any) -> None:
        self._host = host

    def generate(self, chunk: Sequence[Mapping[str, Any]], policy: Any, seconds: float) -> Any:
        return self._host.generate.remote(chunk, policy, seconds)

    def ready(self) -> Any:
        return self._host.ready.remote()


def _pool(ray: Any, count: int) -> Any:
    from actors.worker_pool import WorkerPool

    shell = ray.remote(_Host).options(num_cpus=0, max_concurrency=-(-count // HOSTS) + 1)
    hosts = [shell.remote() for _ in range(min(HOSTS, count))]
    ray.get([host.ready.remote() for host in hosts])
    workers = {f"rollout/{index}": _Worker(hosts[index % len(hosts)]) for index in range(count)}
    return WorkerPool(workers, timeout_s=600, late_s=600, ping=lambda worker: worker.ready())


def measure_call(options: argparse.Namespace) -> None:
    """Time the submission of calls that do nothing."""
    import ray

    from actors.rollout import Policy, fields_of

    _start(ray)
    host = ray.remote(_Host).options(num_cpus=0).remote()
    groups = sample_prompts(
        captions(), iteration=0, run_seed=0, num_prompts=options.calls * CHUNK, samples_per_prompt=1, mix=None
    )
    chunks, policy = chunks_of(groups, CHUNK), ray.put(Policy(version=1, bundle=(ray.put(b""),)))
    arguments = {
        "nothing": lambda chunk: (),
        "plans as objects": lambda chunk: (chunk,),
        "plans": lambda chunk: (fields_of(chunk),),
        "plans and policy": lambda chunk: (fields_of(chunk), policy),
    }
    least = dict.fromkeys(arguments, float("inf"))
    for name, given in [*arguments.items()] * options.rounds:
        started = time.thread_time()
        references = [host.ignore.remote(*given(chunk)) for chunk in chunks]
        least[name] = min(least[name], 1e6 * (time.thread_time() - started) / len(chunks))
        ray.get(references[-1][0])
    _say(calls=len(chunks), **{name: round(value) for name, value in least.items()})
    ray.shutdown()


def measure_transfer(options: argparse.Namespace) -> None:
    """Give one object to workers of this machine, at once."""
    import ray

    _start(ray)
    shell = ray.remote(_Host).options(num_cpus=0, max_concurrency=-(-options.workers // HOSTS) + 1)
    hosts = [shell.remote() for _ in range(HOSTS)]
    ray.get([host.ready.remote() for host in hosts])
    started = time.monotonic()
    reference = ray.put(np.zeros(int(options.megabytes * 1e6), np.uint8))
    put_s = time.monotonic() - started
    sizes = ray.get([hosts[index % HOSTS].take.remote([reference]) for index in range(options.workers)])
    _say(
        workers=options.workers, megabytes=options.megabytes, put_s=round(put_s, 3),
        all_s=round(time.monotonic() - started, 3), read_gb=round(sum(sizes) / 1e9, 2),
    )  # fmt: skip
    ray.shutdown()


def _start(ray: Any) -> None:
    # As `RolloutActor.generate` is declared.
    for method in (_Host.generate, _Host.ignore):
        ray.method(num_returns=3)(method)
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
        object_store_memory=2_000_000_000,
    )  # fmt: skip


def _say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
