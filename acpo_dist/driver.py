"""From a configuration to a finished run folder, on whatever ports a backend opens."""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import load_file

from acpo_dist import loop
from acpo_dist.config.load import dump
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import ConfigError, WorkerLostError
from acpo_dist.core.ports import Ports, Tracker
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.types import WeightBundle
from acpo_dist.core.weights import make_bundle
from acpo_dist.data.images import load_pictures
from acpo_dist.data.pairs import PairSet
from acpo_dist.data.prompts import load_prompts
from acpo_dist.guard.guard import Decision
from acpo_dist.models.family import trainable_tensors
from acpo_dist.recipes.prepare import prepare
from acpo_dist.session import RunFolder, git_commit, open_run
from acpo_dist.tracking.composite import CompositeTracker
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import JsonlTracker, read_metrics, truncate_after
from acpo_dist.tracking.pictures import save_curves

logger = logging.getLogger(__name__)

OpenPorts = Callable[[Config, Tracker], AbstractContextManager[Ports]]
Hook = Callable[[Config, Ports, tuple[str, ...]], None]
"""(configuration, ports, prompts) -> None, at a moment of the run."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run leaves."""

    run_dir: Path
    iterations: int
    metrics: dict[str, float]
    mlflow_uri: str | None
    mlflow_run_id: str | None
    export: Path
    seconds: float
    guard: Decision | None
    """Why the guard ended the run early, or None."""


def drive(
    config: Config, open_ports: OpenPorts, console: Console, *, resume: str | None = None,
    at_start: Hook | None = None, at_end: Hook | None = None,
) -> RunResult:  # fmt: skip
    """Run to the end: folder, recipe, prompts, ports, loop, curves, export.

    When processes or machines are lost that the run cannot do without, all ports are opened again and it goes on from
    its newest checkpoint, at most `cluster.max_restarts` times.

    Args:
        at_start: called with base weights in place, before the first iteration.
        at_end: called with the final weights in place, before the ports close.

    Raises:
        AcpoError: bad input before anything starts, or a failure that the run cannot carry on from.
    """
    started, restarts = time.monotonic(), 0
    while True:
        try:
            result = _attempt(config, open_ports, console, resume, at_start, at_end, restarts)
            return replace(result, seconds=time.monotonic() - started)
        except WorkerLostError as error:
            if restarts >= config.cluster.max_restarts:
                raise
            restarts, resume = restarts + 1, "auto"
            logger.warning("%s", error)
            console.message(
                f"{str(error).splitlines()[0]}; going on from the newest checkpoint (restart {restarts} of "
                f"{config.cluster.max_restarts}, cluster.max_restarts)"
            )


def _attempt(
    config: Config, open_ports: OpenPorts, console: Console, resume: str | None, at_start: Hook | None,
    at_end: Hook | None, restarts: int,
) -> RunResult:  # fmt: skip
    started = time.monotonic()
    prompts = load_prompts(config.data.prompts, config.data.prompt_column)
    _require_pictures(config)
    pairs = None
    if config.data.pairs is not None:
        pairs = PairSet(config.data.pairs, size=1).index(absolute=config.data.absolute_pairs)
        console.message("pairs: " + ", ".join(f"{name} {count}" for name, count in pairs.counts.items()))
    resolve("model", MODELS, config.model.type).check(config.model)
    folder, checkpoint = open_run(config, resume)
    if checkpoint is not None:
        console.message(f"continuing from {checkpoint.folder} after {checkpoint.iteration} iterations")
    for record in (folder.metrics, folder.guard):
        truncate_after(record, checkpoint.iteration if checkpoint else 0)
    effective = prepare(config, folder.root / "base", console)
    with ExitStack() as stack:
        tracker, mlflow = _open_tracker(config, folder)
        tracker.set_tags({"restarts": restarts})
        status = "FAILED"
        try:
            ports = replace(stack.enter_context(open_ports(effective, tracker)), pairs=pairs)
            result = loop.run(
                effective, ports, folder, prompts, console, checkpoint=checkpoint,
                on_start=(lambda: at_start(effective, ports, prompts)) if at_start else None,
            )  # fmt: skip
            if at_end is not None:
                at_end(effective, ports, prompts)
            _finish(effective, ports, folder, tracker, _final_weights(ports, folder, result))
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracker.close(status)
    return RunResult(
        run_dir=folder.root, iterations=result.iterations, metrics=result.last_metrics,
        mlflow_uri=mlflow.uri if mlflow else None, mlflow_run_id=mlflow.run_id if mlflow else None,
        export=folder.export, seconds=time.monotonic() - started, guard=result.guard,
    )  # fmt: skip


def _require_pictures(config: Config) -> None:
    """Read one picture now: a wrong column must not be found after the base model is loaded.

    A shipped configuration may leave data.path to the command line, so this is not a relation of the schema.
    """
    anchor = getattr(config.algorithm, "anchor", None)
    if config.data.path is None and getattr(anchor, "source", "rollout") == "data":
        raise ConfigError(
            "algorithm.anchor.source is `data`, but data.path is unset: set it to a parquet file of real pictures, or "
            "algorithm.anchor.source=rollout."
        )
    if config.data.path is not None:
        load_pictures(config.data.path, config.data.image_column, 1, None)


def _open_tracker(config: Config, folder: RunFolder):
    trackers: list[Tracker] = [JsonlTracker(folder.metrics)]
    mlflow = None
    if config.tracking.mlflow:
        from acpo_dist.tracking.mlflow_tracker import MlflowTracker, default_uri

        tags = {
            "git_commit": git_commit(),
            "run_dir": str(folder.root.resolve()),
            "torch": torch.__version__,
            **_versions(),
        }
        mlflow = MlflowTracker(
            config.tracking.mlflow_uri or default_uri(folder.root), config.tracking.experiment, config.run.name,
            spool=folder.root / "mlflow", params=config.to_mapping(),
            tags={name: value for name, value in tags.items() if value is not None},
        )  # fmt: skip
        trackers.append(mlflow)
    tracker = CompositeTracker(trackers)
    tracker.log_text("resolved.yaml", dump(config))
    return tracker, mlflow


def _final_weights(ports: Ports, folder: RunFolder, result: loop.LoopResult) -> WeightBundle:
    """The last weights, or after a roll-back those of the checkpoint that the judges liked best."""
    if result.guard is None or result.guard.action != "roll_back":
        return ports.learner.export(result.version)
    best = folder.checkpoints.open(result.guard.best_iteration)
    return make_bundle(int(best.state["version"]), load_file(best.learner_folder / "policy.safetensors"))


def _finish(config: Config, ports: Ports, folder: RunFolder, tracker: Tracker, bundle: WeightBundle) -> None:
    rows = read_metrics(folder.metrics)
    if rows:
        curves = folder.root / "curves.png"
        save_curves(rows, _panels(config), curves)
        tracker.log_image("curves", config.run.iterations, curves)
    export_pipeline(config, bundle, folder.export)
    tracker.set_tags({"export": str(folder.export)})


def _panels(config: Config) -> dict[str, list[str]]:
    """What the curves show."""
    rewards = [f"reward/{entry.name}/mean" for entry in config.rewards.train]
    judges = [f"judge/{entry.name}/mean" for entry in config.rewards.judges]
    return {
        "quality": rewards + judges,
        "drift": ["drift/rms", "drift/budget"],
        "anchor weight": ["anchor/weight"],
        "seconds": ["time/rollout", "time/reward", "time/learn", "time/sync"],
    }


def export_pipeline(config: Config, bundle: WeightBundle, folder: Path) -> None:
    """Write the tuned model as a pipeline folder that plain diffusers opens."""
    family = resolve("model", MODELS, config.model.type).load(config.model, device="cpu", trainable=False)
    with torch.no_grad():
        for name, parameter in trainable_tensors(family.network).items():
            parameter.copy_(bundle.tensors[name])
    family.save_pipeline(folder)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("acpo-dist", "diffusers", "transformers", "peft", "ray", "deepspeed"):
        try:
            found[f"version.{name}"] = version(name)
        except PackageNotFoundError:
            continue
    return found
