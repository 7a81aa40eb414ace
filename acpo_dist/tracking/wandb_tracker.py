"""Weights & Biases tracker, online or offline."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from acpo_dist.core.errors import ConfigError
from acpo_dist.core.ports import Tracker


class WandbTracker(Tracker):
    """Records a run in Weights & Biases: one W&B run, however often the run is stopped and resumed.

    Args:
        folder: run folder; W&B writes its files to `wandb` there.
        mode: `online`, or `offline` (upload later with `wandb sync`).
        project: name of the project.
        name: name of the run.
        params: the configuration.

    Raises:
        ConfigError: W&B is not installed.
    """

    def __init__(
        self, folder: Path, *, mode: Literal["online", "offline"], project: str, name: str, params: Mapping[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"`tracking.wandb={mode}` needs Weights & Biases, which cannot be imported ({error}): pip install "
                "'acpo-dist[wandb]', or set tracking.wandb=off."
            ) from error
        self._wandb = wandb
        id_file = folder / "wandb_run_id"
        known = id_file.read_text().strip() if id_file.is_file() else secrets.token_hex(4)
        self._run: Any = wandb.init(
            project=project, name=name, id=known, resume="allow", mode=mode, dir=str(folder), config=dict(params),
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        id_file.write_text(f"{known}\n")
        # W&B's own step only grows, and a resumed run repeats iterations.
        self._run.define_metric("*", step_metric="iteration")

    @override
    def log_metrics(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **{name: float(value) for name, value in metrics.items()}})

    @override
    def log_image(self, name: str, iteration: int, path: Path) -> None:
        self._run.log({"iteration": iteration, name: self._wandb.Image(str(path))})

    @override
    def log_text(self, name: str, text: str) -> None:
        self._run.summary[name] = text

    @override
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._run.summary.update({f"tags/{name}": str(value) for name, value in tags.items()})

    @override
    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status in ("FINISHED", "RUNNING") else 1)
