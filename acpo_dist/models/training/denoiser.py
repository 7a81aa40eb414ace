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
    timestep_sampling: str = "uniform",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> float:
    """Minimise the prediction error over random timesteps; the network ends with the averaged weights.

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
        prediction_type: prediction target of the network: `epsilon`, `v_prediction` or `flow_prediction`.
        timestep_sampling: distribution of the timesteps, `uniform`, `log_normal` (`log_normal_timesteps`) or
            `logit_normal` (of sigma, for flow models).
        dtype: compute type of the forward pass; weights, loss and optimiser stay in float32.
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
        if timestep_sampling == "log_normal":
            timesteps = log_normal_timesteps(batch_size, alpha_bars, generator)
        elif timestep_sampling == "logit_normal":
            # Logit-normal, as Stable Diffusion 3.
            sigmas = torch.randn(batch_size, generator=generator).sigmoid()
            timesteps = (sigmas * len(alpha_bars)).long().clamp(max=len(alpha_bars) - 1)
        else:
            timesteps = torch.randint(len(alpha_bars), (batch_size,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        alpha_bar = alpha_bars[timesteps].to(clean.dtype).reshape(-1, *[1] * (clean.ndim - 1))
        noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
        if prediction_type == "flow_prediction":
            target = noise - clean
        elif prediction_type == "epsilon":
            target = noise
        else:
            target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
        with torch.autocast(noisy.device.type, dtype, enabled=dtype != torch.float32):
            model_output = predict(network, noisy, timesteps, condition)
        loss = F.mse_loss(model_output.float(), target)
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


def log_normal_timesteps(count: int, alpha_bars: Tensor, generator: torch.Generator) -> Tensor:
    """Draw timesteps whose noise-to-signal ratio sigma is log-normal, and a fifth of them uniformly.

    ln sigma has mean -1 and standard deviation 1.2, about the training distribution of EDM (Karras et al. 2022, table
    1: -1.2 and 1.2). The uniform share keeps the highest noise levels in training.

    Args:
        count: number of timesteps.
        alpha_bars: cumulative signal fraction by timestep, decreasing, shape (T,).
        generator: source of randomness.

    Returns:
        Timesteps in [0, T), shape (count,).
    """
    log_sigmas = 0.5 * ((1 - alpha_bars) / alpha_bars).log()
    wanted = 1.2 * torch.randn(count, generator=generator) - 1.0
    drawn = torch.searchsorted(log_sigmas, wanted.to(log_sigmas)).clamp(max=len(alpha_bars) - 1)
    uniform = torch.randint(len(alpha_bars), (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.2, uniform, drawn)


@torch.no_grad()
def _average(average: nn.Module, network: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if slow.dtype.is_floating_point:
            slow.lerp_(fast, 1 - decay)
        else:
            slow.copy_(fast)
