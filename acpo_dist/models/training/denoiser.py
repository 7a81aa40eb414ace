"""Train a small noise-prediction network from scratch, for the base models of the toy world and the CIFAR-10 recipe."""

import copy
import logging
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Example = tuple[Tensor, object]
ExampleBatch = Callable[[int, torch.Generator], Example]
"""(count, generator) -> (clean x_0 of shape (B, C, H, W), condition for `predict`)."""
Predict = Callable[[nn.Module, Tensor, Tensor, object], Tensor]
"""(network, x_t, timesteps, condition) -> network output."""
Progress = Callable[[int, int, float], None]
"""(step, steps, loss) -> None."""


def train_denoiser(
    network: nn.Module,
    draw: ExampleBatch,
    predict: Predict,
    alpha_bars: Tensor,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.999,
    max_seconds: float | None = None,
    prediction_type: str = "epsilon",
    progress: Progress | None = None,
) -> float:
    """Minimise the noise-prediction error over uniform timesteps; the network ends with the averaged weights.

    Args:
        network: network to train.
        draw: source of training examples.
        predict: calls the network.
        alpha_bars: cumulative signal fraction by timestep, shape (T,).
        steps: number of optimiser steps.
        batch_size: samples per step.
        seed: seed of samples, noise and timesteps.
        learning_rate: peak learning rate.
        ema_decay: decay of the weight average.
        max_seconds: time limit in seconds; if set, the learning-rate decay follows the clock and still completes.
        prediction_type: prediction target of the network: `epsilon` or `v_prediction`.
        progress: called after a step.

    Returns:
        Mean loss over the last tenth of the steps.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    average = copy.deepcopy(network).requires_grad_(False)
    started = time.monotonic()
    losses: list[float] = []
    network.train()
    for step in range(steps):
        done = step / steps
        if max_seconds is not None:
            done = max(done, (time.monotonic() - started) / max_seconds)
            if done >= 1:
                break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 200) * (1.0 if done < 0.5 else 2.02 - 2 * done)
        clean, condition = draw(batch_size, generator)
        timesteps = torch.randint(len(alpha_bars), (batch_size,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        alpha_bar = alpha_bars[timesteps].to(clean.dtype).reshape(-1, *[1] * (clean.ndim - 1))
        noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
        target = noise if prediction_type == "epsilon" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
        loss = F.mse_loss(predict(network, noisy, timesteps, condition), target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        # The averaging window grows with the run, so that a short run does not stay near its random initialisation.
        _average(average, network, min(ema_decay, (1 + step) / (10 + step)))
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, steps, losses[-1])
        if step % 200 == 0:
            logger.info("denoiser step %d of %d: loss %.4f", step, steps, losses[-1])
    network.load_state_dict(average.state_dict())
    network.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


@torch.no_grad()
def _average(average: nn.Module, network: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if slow.dtype.is_floating_point:
            slow.lerp_(fast, 1 - decay)
        else:
            slow.copy_(fast)
