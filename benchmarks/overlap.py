"""Compare a learner that computes the anchor while the reward pool works with one that first waits for the response.

    .venv/bin/python benchmarks/overlap.py [--rounds 5] [--config toy_sdxl] [KEY=VALUE ...]

One learner in this process and the pool on Ray Serve beside it, on the same samples, in turns. One JSON line: median
seconds of an iteration's updates with and without overlap, their ratio, and the seconds of them spent waiting.
"""

import os

# Before torch is imported: two torch threads on contended cores are tens of times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import logging
import sys
import time
from statistics import median
from typing import Any

import ray

from acpo_dist.config.load import load_config
from acpo_dist.core.types import Normaliser, RewardTerm, TrainTask
from acpo_dist.data.prompts import load_prompts
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.local import LocalRollouts, default_device, learner_spec
from acpo_dist.workers.learner.signal import PooledReward
from acpo_dist.workers.learner.worker import LearnerWorker
from actors.reward.pool import deploy


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--config", default="toy_sdxl")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    config = load_config(options.config, [*options.overrides, "rewards.judges=[]"])
    ray.init(num_cpus=8, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, namespace="acpo")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    pool = deploy(config, "acpo-overlap")
    try:
        sys.stdout.write(json.dumps(_measure(config, pool.client, options.rounds)) + "\n")
    finally:
        pool.close()
        ray.shutdown()


def _measure(config: Any, client: Any, rounds: int) -> dict[str, Any]:
    device = default_device()
    prompts = load_prompts(config.data.prompts, config.data.prompt_column)
    samples = config.rollout.prompts_per_iteration * config.rollout.samples_per_prompt
    handles = LocalRollouts(config, device=device).generate(fixed_groups(config, prompts, samples, stream="bench"))
    batches = [handle.payload for handle in handles]
    ids = tuple(name for batch in batches for name in batch.sample_ids)
    normaliser = Normaliser(mean=0.5, std=0.2, sign=1)
    learner = LearnerWorker(learner_spec(config), client, device=device)
    learner.start(None)
    overlapped = PooledReward.__call__

    def waiting(self: PooledReward, *arguments: Any) -> Any:
        signal = overlapped(self, *arguments)()
        return lambda: signal

    seconds: dict[str, list[float]] = {"overlapped": [], "waiting": []}
    waited: dict[str, list[float]] = {"overlapped": [], "waiting": []}
    for iteration in range(rounds + 1):
        for name, call in (("overlapped", overlapped), ("waiting", waiting)):
            PooledReward.__call__ = call
            task = TrainTask(
                iteration=iteration, policy_version=0, sample_ids=ids, weights=dict.fromkeys(ids, 1.0),
                anchor_weight=2.0, learning_rate=1e-6,
                rewards=tuple(
                    RewardTerm(name=entry.name, weight=1.0, normaliser=normaliser) for entry in config.rewards.train
                ),
            )  # fmt: skip
            started = time.monotonic()
            metrics, _, _ = learner.train(batches, task)
            if iteration:  # the first warms caches and the pool
                seconds[name].append(time.monotonic() - started)
                waited[name].append(metrics.means().get("time/reward_gradient", 0.0))
    PooledReward.__call__ = overlapped
    found = {name: round(median(values), 3) for name, values in seconds.items()}
    return {
        "samples": len(ids), "seconds": found, "ratio": round(found["overlapped"] / found["waiting"], 3),
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in seconds.items()},
        "waited_s": {name: round(median(values), 3) for name, values in waited.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
