"""Distil a metric into a latent critic: label x0-hat of a model's own rollouts, fit the network, write the file."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from acpo_dist.config.plugins import MetricConfig
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import RewardConfigError
from acpo_dist.core.ports import Advance
from acpo_dist.core.types import RolloutBatch
from acpo_dist.data.prompts import run_prompts
from acpo_dist.diffusion.prediction import to_clean
from acpo_dist.models.family import ModelFamily
from acpo_dist.rewards.critic_config import FACTS_KEY, CriticFacts
from acpo_dist.rewards.latent_critic import PROBE, CriticNetwork, decoded_probe
from acpo_dist.rewards.training.critic import (
    FINAL,
    CriticError,
    CriticSettings,
    LabelledLatents,
    fit_critic,
    measure_critic,
    seconds_per_state,
    split_rollouts,
)
from acpo_dist.tracking.console import Console
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.local import LocalRollouts
from acpo_dist.workers.reward.wire import pack, unpack
from acpo_dist.workers.reward.worker import RewardWorker


@dataclass(frozen=True, kw_only=True)
class DistilReport:
    """Error of the critic on held-out rollouts, and its cost."""

    metric: str
    model: str
    rollouts: int
    held_out_rollouts: int
    states: int
    """States of the training rollouts."""
    parameters: int
    by_timestep: tuple[CriticError, ...]
    """The noisiest first; finished samples, with timestep -1, last."""
    metric_cpu_s: float
    """CPU seconds of decoding, metric and gradient of one state; of decoding and metric without a usable gradient."""
    critic_cpu_s: float
    """CPU seconds of the critic's score and gradient of one state."""
    label_s: float
    """Seconds of drawing and labelling."""
    fit_s: float
    weights: str


def require_distillable(metric: MetricConfig, config: Config) -> None:
    """Check that a critic of the metric serves the model.

    Raises:
        RewardConfigError: the model works on pixels, or the metric reads prompts or scores latents itself.
    """
    if config.model.pixel_space:
        raise RewardConfigError(
            f"`{config.model.type}` works on pixels, so no decoder stands before `{metric.name}`: train on the metric "
            "itself."
        )
    if metric.needs_prompts:
        raise RewardConfigError(
            f"`{metric.name}` compares an image with its prompt, and a critic reads latents only. Distil a metric "
            "without prompts, or train on the metric itself."
        )
    if metric.space == "latent":
        raise RewardConfigError(f"`{metric.name}` scores latents itself: name the metric that it estimates.")


def distil(
    metric: MetricConfig, config: Config, rollouts: LocalRollouts, out: Path, settings: CriticSettings, *,
    count: int, held_out: float = 0.2, console: Console,
) -> DistilReport:  # fmt: skip
    """Draw, label, fit, measure on held-out rollouts, and write the critic.

    The states are those on which a run of `config` trains: the late states of its sampler, and the finished samples.

    Args:
        metric: section of the metric.
        config: configuration of the model, its sampler and its prompts.
        rollouts: the model with the weights to draw with.
        out: safetensors file to write; the report is written beside it as JSON.
        settings: training settings.
        count: number of rollouts.
        held_out: share of the rollouts for the report.
        console: shows the progress.

    Raises:
        RewardConfigError: the metric or the model is unsuitable (`require_distillable`).
        RewardError: the metric fails on an image.
    """
    require_distillable(metric, config)
    started = time.monotonic()
    labeller = _Labeller(metric, config, rollouts)
    with console.phase("label", count) as advance:
        data = labeller.label(count, advance)
    label_s, started = time.monotonic() - started, time.monotonic()
    train, rest = split_rollouts(data, held_out, settings.seed)
    torch.manual_seed(settings.seed)
    network = CriticNetwork(data[0].clean.shape[1], settings.width)
    with console.phase("fit", settings.steps) as advance:
        fit_critic(network, train, settings, advance)
    report = DistilReport(
        metric=metric.name, model=str(getattr(config.model, "path", config.model.type)), rollouts=count,
        held_out_rollouts=len(torch.cat([part.rollouts for part in rest]).unique()),
        states=sum(len(part.scores) for part in train),
        parameters=sum(value.numel() for value in network.parameters()),
        by_timestep=tuple(measure_critic(network, rest)), metric_cpu_s=labeller.cpu_s / labeller.labelled,
        critic_cpu_s=seconds_per_state(network, data[0].clean[:16]), label_s=label_s,
        fit_s=time.monotonic() - started, weights=str(out),
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = _facts(metric, config, rollouts.worker.family, data, settings)
    probe = decoded_probe(rollouts.worker.family, facts.channels, rollouts.worker.family.device)
    tensors = {name: value.detach().contiguous() for name, value in network.state_dict().items()}
    save_file({**tensors, PROBE: probe}, out, metadata={FACTS_KEY: facts.model_dump_json()})
    out.with_suffix(".json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report


class _Labeller:
    """Draws rollouts and labels their x0-hat with score and gradient."""

    def __init__(self, metric: MetricConfig, config: Config, rollouts: LocalRollouts) -> None:
        self._config, self._rollouts = config, rollouts
        self._family: ModelFamily = rollouts.worker.family
        self._differentiable = metric.differentiable
        self._metric = RewardWorker(
            metric, model=config.model, cut="latent", wire_dtype="float32", device=self._family.device
        )
        self.cpu_s, self.labelled = 0.0, 0

    def label(self, count: int, advance: Advance) -> list[LabelledLatents]:
        """Label the states of `count` rollouts; one entry per size."""
        groups = fixed_groups(self._config, run_prompts(self._config), count, stream="distil")
        found: dict[tuple[int, ...], list[LabelledLatents]] = {}
        done, step = 0, max(1, self._config.rollout.batch_size)
        for start in range(0, count, step):
            # Part by part, so that the rollouts' states are not held beside the labelled ones.
            for handle in self._rollouts.generate(groups[start : start + step]):
                batch: RolloutBatch = handle.payload
                numbers = torch.arange(done, done + len(batch.sample_ids))
                done += len(numbers)
                for timestep, clean in self._estimates(batch):
                    part = self._labelled(clean, batch.prompts, timestep, numbers)
                    found.setdefault(tuple(clean.shape[1:]), []).append(part)
                advance(len(numbers))
        return [_joined(parts) for parts in found.values()]

    @torch.no_grad()
    def _estimates(self, batch: RolloutBatch) -> Iterator[tuple[float, Tensor]]:
        """Yield (timestep, x0-hat of the conditional branch) of every late state, then the finished samples."""
        family = self._family
        condition = family.encode(batch.prompts)
        for late in batch.late:
            noisy = late.latents_BCHW.to(family.device)
            timesteps = torch.full((len(noisy),), late.timestep, device=noisy.device)
            levels = torch.full((len(noisy),), late.alpha_bar, dtype=torch.float64)
            model_output = family.predict(noisy, timesteps, condition)
            yield late.timestep, to_clean(model_output, noisy, levels, family.prediction_type).float().cpu()
        yield FINAL, batch.latents_BCHW

    def _labelled(
        self, clean: Tensor, prompts: Sequence[str], timestep: float, numbers: Tensor
    ) -> LabelledLatents:  # fmt: skip
        started = time.process_time()
        gradients = None
        if self._differentiable:
            answer = self._metric.value_and_grad(pack(clean, "float32"), prompts)
            scores, gradients = answer.scores, unpack(answer.gradient)
        else:
            with torch.no_grad():
                pixels = self._family.decode(clean.to(self._family.device)).clamp(0, 1)
            scores = self._metric.score((pixels * 255).round().to(torch.uint8).cpu(), prompts)
        self.cpu_s += time.process_time() - started
        self.labelled += len(clean)
        return LabelledLatents(
            clean=clean, scores=torch.tensor(scores), gradients=gradients,
            timesteps=torch.full((len(clean),), float(timestep)), rollouts=numbers,
        )  # fmt: skip


def _joined(parts: Sequence[LabelledLatents]) -> LabelledLatents:
    gradients = [part.gradients for part in parts if part.gradients is not None]
    return LabelledLatents(
        clean=torch.cat([part.clean for part in parts]), scores=torch.cat([part.scores for part in parts]),
        gradients=torch.cat(gradients) if gradients else None,
        timesteps=torch.cat([part.timesteps for part in parts]),
        rollouts=torch.cat([part.rollouts for part in parts]),
    )  # fmt: skip


def _facts(
    metric: MetricConfig, config: Config, family: ModelFamily, data: Sequence[LabelledLatents], settings: CriticSettings
) -> CriticFacts:
    shapes = tuple((part.clean.shape[2], part.clean.shape[3]) for part in data)
    factor = family.size[0] // family.sample_shape[2]
    return CriticFacts(
        metric=metric.model_dump(mode="json", exclude_defaults=True) | {"type": metric.type},
        direction=1 if metric.direction > 0 else -1, score_range=metric.score_range, licence=metric.licence,
        model=config.model.type, path=str(getattr(config.model, "path", "")), channels=data[0].clean.shape[1],
        shapes=shapes, sizes=tuple((width * factor, height * factor) for height, width in shapes),
        width=settings.width,
    )  # fmt: skip
