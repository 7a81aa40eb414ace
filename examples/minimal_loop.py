"""The whole ACPO update in one file, on the ports in this process: python examples/minimal_loop.py

`acpo train` runs the same steps (acpo_dist/training/loop.py) and adds what a long run needs: checkpoints and resume,
the guard, trajectory optimisation, trackers, image grids and the export. The first iteration here has the same metrics.
"""

import argparse
import sys
from pathlib import Path

import torch

from acpo_dist.algorithms.base import Algorithm
from acpo_dist.config.load import load_config
from acpo_dist.config.schema import Config
from acpo_dist.core.ports import Ports
from acpo_dist.core.registry import ALGORITHMS, resolve
from acpo_dist.core.types import Normaliser, RewardTerm, ScoredGroups, TrainTask
from acpo_dist.data.prompts import load_prompts, sample_prompts
from acpo_dist.objective.controller import DriftController, initial_anchor_weight
from acpo_dist.objective.normalise import fit_normaliser
from acpo_dist.tracking.composite import CompositeTracker
from acpo_dist.training.calibration import start_factor
from acpo_dist.training.local import open_ports
from acpo_dist.workers.learner.rates import learning_rate


def train(config: Config) -> list[dict[str, float]]:
    """Fine-tune the model of a pathwise algorithm (`acpo`) and return the metrics of every iteration."""
    prompts = load_prompts(config.data.prompts, config.data.prompt_column)
    with open_ports(config, CompositeTracker([])) as ports:
        ports.learner.start(None)
        normalisers, controller = calibrate(config, ports, prompts)
        ports.weights.publish(0)
        history: list[dict[str, float]] = []
        for iteration in range(config.run.iterations):
            metrics, controller = update(config, ports, prompts, iteration, normalisers, controller)
            history.append(metrics)
        return history


def calibrate(config: Config, ports: Ports, prompts: tuple[str, ...]) -> tuple[dict[str, Normaliser], DriftController]:
    """Normalise every metric on samples of the base model, and compute the first anchor weight from them."""
    per_prompt = config.rollout.samples_per_prompt
    groups = sample_prompts(
        prompts, iteration=0, run_seed=config.run.seed, stream="calibration",
        num_prompts=-(-config.rewards.calibration_samples // per_prompt), samples_per_prompt=per_prompt,
    )  # fmt: skip
    handles = ports.rollout.generate(groups)
    entries = (*config.rewards.train, *config.rewards.judges)
    scores = ports.reward.score(handles, [entry.name for entry in entries])
    normalisers = {
        entry.name: fit_normaliser(
            entry.name, list(scores[entry.name].values()), target_quantile=config.algorithm.target_quantile,
            higher_is_better=entry.direction > 0,
        )
        for entry in entries
    }  # fmt: skip
    # One unconstrained step at this weight drifts by about the budget; the controller adjusts it from there.
    anchor = config.algorithm.anchor
    scale = ports.learner.gradient_scale(handles, reward_terms(config, normalisers))
    weight = start_factor(config) * initial_anchor_weight(
        reward_weight=config.algorithm.reward_weight, num_elements=scale.num_elements,
        gradient_norm=scale.median_norm, budget=anchor.budget,
    )  # fmt: skip
    return normalisers, DriftController(weight=weight, budget=anchor.budget, rate=anchor.rate, headroom=anchor.headroom)


def update(
    config: Config, ports: Ports, prompts: tuple[str, ...], iteration: int, normalisers: dict[str, Normaliser],
    controller: DriftController,
) -> tuple[dict[str, float], DriftController]:  # fmt: skip
    """One iteration: rollouts, scores, gradient steps, new weights on the rollout workers, next anchor weight."""
    # 1. Rollouts of the present policy. A sample's seed follows from (run seed, iteration, prompt, position).
    groups = sample_prompts(
        prompts, iteration=iteration, run_seed=config.run.seed,
        num_prompts=config.rollout.prompts_per_iteration, samples_per_prompt=config.rollout.samples_per_prompt,
    )  # fmt: skip
    handles = ports.rollout.generate(groups)
    ids = [plan.sample_id for group in groups for plan in group.samples]
    # 2. Scores. Judges are measured and never train.
    scores = ports.reward.score(handles, list(normalisers))
    # 3. The algorithm selects samples and their weights; ACPO takes all of them.
    algorithm: Algorithm = resolve("algorithm", ALGORITHMS, config.algorithm.type)(config.algorithm)
    selection = algorithm.select(
        ScoredGroups(
            groups=tuple(groups), weights=config.rewards.term_weights(), spread=config.rewards.spread,
            qualities={
                entry.name: {key: normalisers[entry.name].reward(scores[entry.name][key]) for key in ids}
                for entry in config.rewards.train
            },
            images=lambda: dict(zip(ids, ports.rollout.images(handles, ids), strict=True)),
        )
    )  # fmt: skip
    # 4. Gradient steps: -q(decode(x0_hat)) at late states + anchor_weight * |eps_policy - eps_base|^2 at all timesteps.
    report = ports.learner.train(
        handles,
        TrainTask(
            iteration=iteration, policy_version=iteration, sample_ids=selection.sample_ids, weights=selection.weights,
            anchor_weight=controller.weight, learning_rate=learning_rate(config, iteration),
            rewards=reward_terms(config, normalisers),
        ),
    )  # fmt: skip
    # 5. The rollout workers get the new weights and confirm version and checksum.
    ports.weights.publish(iteration + 1)
    drift = max(report.metrics[name] for name in ("anchor/late", "anchor/uniform") if name in report.metrics)
    gains: dict[str, float] = {}
    for name, normaliser in normalisers.items():
        kind = "reward" if name in config.rewards.term_weights() else "judge"
        normalised = [normaliser.normalise(score) for score in scores[name].values()]
        gains[f"{kind}/{name}/gain"] = sum(normalised) / len(normalised)
    metrics = {**report.metrics, **gains, "anchor/weight": controller.weight, "drift/rms": drift**0.5}
    # 6. More drift than the budget raises the anchor weight, less lowers it.
    return metrics, controller.update(drift)


def reward_terms(config: Config, normalisers: dict[str, Normaliser]) -> tuple[RewardTerm, ...]:
    """The rewards that train, with their weights."""
    weights = config.rewards.term_weights()
    return tuple(RewardTerm(name=name, weight=w, normaliser=normalisers[name]) for name, w in weights.items())


def main() -> None:
    """Train the embedded toy SDXL and print one line per iteration."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("config", type=Path, nargs="?", default=Path("configs/toy_sdxl.yaml"))
    parser.add_argument("overrides", nargs="*", help="key=value, as for `acpo train`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for iteration, metrics in enumerate(train(load_config(options.config, options.overrides))):
        shown = {name: value for name, value in metrics.items() if name.endswith(("gain", "rms", "weight"))}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        sys.stdout.write(f"{iteration}  {text}\n")


if __name__ == "__main__":
    main()
