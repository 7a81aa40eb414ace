"""Adapter for pyiqa's no-reference metrics; pyiqa is an optional extra with a noncommercial licence."""

import contextlib
import io
import pickle
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from acpo_dist.core.errors import RewardConfigError, RewardError
from acpo_dist.rewards.config import PyiqaConfig
from acpo_dist.rewards.inputs import check_images
from acpo_dist.rewards.pyiqa_table import PYIQA, PyiqaFacts

_NETWORK_TIMEOUT_S = 30.0
_PROBE_TIMEOUT_S = 10.0
_CPU_PIXELS = 224 * 224
"""Largest number of pixels per forward pass on a CPU: CNNIQA is twice as fast on one image of this size as on
sixteen."""
_BUILD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, ImportError, AttributeError, AssertionError)
_READ_ERRORS = (OSError, RuntimeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError, SafetensorError)
_ANNOUNCED = re.compile(r'Downloading: "(\S+)" to (\S+)')


class PyiqaMetric:
    """One pyiqa metric, per image, in its own unit and direction."""

    Config = PyiqaConfig

    def __init__(self, config: PyiqaConfig, *, device: str = "cpu") -> None:
        """Build the metric.

        Raises:
            RewardConfigError: pyiqa is not installed, or its weights cannot be loaded.
        """
        reason = config.unusable()
        if reason:
            raise RewardConfigError(f"`{config.name}`: {reason}")
        self._name, self._metric, self._facts = config.name, config.metric, PYIQA[config.metric]
        # Use the network without pyiqa's wrapper, which toggles cuDNN and checks the range in every call.
        self.network: Any = _build(config, self._facts, device).eval().requires_grad_(False)
        self._order = torch.channels_last if self._facts.channels_last else torch.contiguous_format
        self.network.to(memory_format=self._order)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images; the prompts are ignored.

        Args:
            images: float32 RGB in [0, 1], shape (B, 3, H, W).
            prompts: one per image.

        Returns:
            Raw scores (B,), float32.

        Raises:
            RewardError: the images are invalid or too small, or pyiqa cannot score them.
        """
        check_images(images, name=self._name, minimum=self._facts.minimum)
        parts = self._parts(images)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._facts.differentiable):
                answers = [self.network(part) for part in parts]
                scores = [answer[0] if isinstance(answer, (tuple, list)) else answer for answer in answers]
                return torch.cat([score.reshape(-1) for score in scores]).reshape(len(images)).float()
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            raise RewardError(
                f"`{self._name}`: pyiqa's `{self._metric}` cannot score shape {tuple(images.shape)}: {error}"
            ) from error

    def _parts(self, images: Tensor) -> list[Tensor]:
        """Split the images into batches for the network."""
        if not self._facts.batched:
            # Copies: some metrics write into their input.
            return [part.clone() for part in images.split(1)]
        if images.device.type != "cpu":
            return [images]
        # A batch that exceeds the processor's cache is slower than several small ones.
        parts = images.split(max(1, _CPU_PIXELS // (images.shape[2] * images.shape[3])))
        return [part.contiguous(memory_format=self._order) for part in parts]


def _build(config: PyiqaConfig, facts: PyiqaFacts, device: str) -> Any:
    said = _Spoken()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {}
        state: dict[str, Tensor] = {}
        if config.weights is not None:
            path = Path(config.weights).expanduser()
            if facts.local != "file":
                state = _read_state(path, config)
                path = Path(folder) / "weights.pth"
                torch.save({"params": state} if facts.local == "params" else state, path)
            options = {"pretrained_model_path": str(path), **dict(facts.options)}
        try:
            with contextlib.redirect_stdout(said), _network_timeout(_NETWORK_TIMEOUT_S), _reachable_hub(facts.backbone):
                import pyiqa

                network = pyiqa.create_metric(config.metric, device=torch.device(device), **options).net
        except _BUILD_ERRORS as error:
            raise RewardConfigError(_build_message(config, facts, error, said.getvalue())) from error
    # Some pyiqa loaders ignore missing tensors; those parameters would keep their random initial values.
    missing = [name for name, _ in network.named_parameters() if state and name not in state]
    if missing:
        raise RewardConfigError(
            f"`{config.name}`: {config.weights} does not hold weights for `{config.metric}`: {len(missing)} tensors "
            f"are missing, such as `{missing[0]}`"
        )
    return network


def _read_state(path: Path, config: PyiqaConfig) -> dict[str, Tensor]:
    """Read tensors by name. Only tensors are unpickled here; pyiqa, which unpickles any object, loads a copy."""
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        state = found.get("params", found)
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("expected a state dict, or one below the key `params`")
    except _READ_ERRORS as error:
        raise RewardConfigError(
            f"`{config.name}`: {path} does not hold weights for `{config.metric}`: {error}"
        ) from error
    return {name.removeprefix("module."): value for name, value in state.items()}


def _build_message(config: PyiqaConfig, facts: PyiqaFacts, error: Exception, said: str) -> str:
    reason = str(error).rstrip(".")
    parts = [f"`{config.name}`: pyiqa cannot build `{config.metric}`: {reason}."]
    if config.weights is not None:
        parts.append(f"Its weights were set to {config.weights}.")
    announced = _ANNOUNCED.findall(said)
    if announced:
        address, target = announced[-1]
        parts.append(f"Without a network, download {address} elsewhere and store it as {target}.")
    if facts.backbone:
        parts.append(f"It downloads its backbone in any case: {facts.backbone}.")
    if config.weights is None and facts.local is not None:
        parts.append("Or set `weights` to a file that pyiqa reads.")
    return " ".join(parts)


class _Spoken(io.StringIO):
    """Collects pyiqa's output for error messages and forwards it to stderr; stdout is reserved for results."""

    def write(self, text: str, /) -> int:
        sys.stderr.write(text)
        return super().write(text)


@contextlib.contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Set a socket timeout, since pyiqa downloads without one and would hang on a machine without network."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _reachable_hub(backbone: str) -> Iterator[None]:
    """Switch the model hub off if a backbone of timm needs it and it cannot be reached: only its cache is used then.

    The hub's client repeats the request for every file for half a minute.
    """
    if not backbone.startswith("timm"):
        yield
        return
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_TIMEOUT_S)
    except Exception:  # the exceptions of the hub's http library change between versions
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
