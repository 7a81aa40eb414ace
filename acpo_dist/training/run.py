"""Execute a run from its configuration to the finished run folder, on the ports of any backend."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from acpo_dist.config.load import dump
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import ConfigError, LearnerLostError, ModelError, RunTakenError, WorkerLostError
from acpo_dist.core.files import on_storage
from acpo_dist.core.packages import installed_versions
from acpo_dist.core.ports import Ports, Tracker
from acpo_dist.core.processor import computes_bfloat16
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.types import WeightBundle
from acpo_dist.core.weights import make_bundle
from acpo_dist.data.captions import CAPTION_COLUMNS
from acpo_dist.data.encoded import EncodedImages
from acpo_dist.data.images import load_images
from acpo_dist.data.pairs import PairIndex, PairSet
from acpo_dist.data.prompts import run_prompts
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.text import describe_long
from acpo_dist.tracking.composite import CompositeTracker, optional_trackers
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.images import save_curves
from acpo_dist.tracking.jsonl import JsonlTracker, read_metrics, truncate_after
from acpo_dist.training import loop
from acpo_dist.training.context import RunContext
from acpo_dist.training.export import export_run, read_export_facts
from acpo_dist.training.guard.guard import Decision
from acpo_dist.training.guard.monitor import ending_of
from acpo_dist.training.kept import KeptStates
from acpo_dist.training.prepare import prepare
from acpo_dist.training.run_folder import RunFolder, git_commit, open_run
from acpo_dist.training.run_lock import RunLock, held
from acpo_dist.workers.learner.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_CAPTIONS_TRIED = 32

OpenPorts = Callable[[Config, Tracker], AbstractContextManager[Ports]]
Hook = Callable[[Config, Ports, tuple[str, ...]], None]
"""(configuration, ports, prompts) -> None; called once during the run."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Result of a run."""

    run_dir: Path
    iterations: int
    metrics: dict[str, float]
    mlflow_uri: str | None
    mlflow_run_id: str | None
    export: Path
    seconds: float
    guard: Decision | None
    """The decision with which the guard ended the run early, or None."""


@dataclass(frozen=True, kw_only=True)
class FinalWeights:
    """What a run exports."""

    iteration: int
    bundle: WeightBundle
    """Weights in float32."""
    checkpoint: Checkpoint | None
    """Where they come from; None for base weights without a checkpoint."""


def drive(
    config: Config, open_ports: OpenPorts, console: Console, *, resume: str | None = None,
    at_start: Hook | None = None, at_end: Hook | None = None,
) -> RunResult:  # fmt: skip
    """Execute a run: lock, folder, prompts, ports, loop, curves, export.

    If required processes or hosts are lost, the run continues from the learner's kept state or the newest checkpoint,
    at most `cluster.max_restarts` times: with new learner ranks if only these were lost, otherwise with all ports
    opened again.

    Args:
        at_start: called with base weights in place, before the first iteration.
        at_end: called with the final weights in place, before the ports close.

    Raises:
        AcpoError: invalid input before the start, or a failure that the run cannot recover from.
    """
    started, restarts = time.monotonic(), _Restarts(config.cluster.max_restarts, console)
    with on_storage(config.run_dir), ExitStack() as stack:
        # Acquired once, after the input has been checked.
        lock = cache(lambda: stack.enter_context(held(config.run_dir)))
        while True:
            try:
                result = _attempt(config, open_ports, console, resume, at_start, at_end, restarts, lock)
                return replace(result, seconds=time.monotonic() - started)
            except WorkerLostError as error:
                restarts.require(error)
                resume = "auto"


@dataclass
class _Restarts:
    """Restarts of a run after losses."""

    limit: int
    console: Console
    count: int = 0

    def require(self, error: WorkerLostError) -> None:
        """Count and report a restart; raise the error if there were too many."""
        if self.count >= self.limit:
            raise error
        self.count += 1
        logger.warning("%s", error)
        self.console.message(
            f"{str(error).splitlines()[0]}; continuing after the last iteration whose state is saved, or from the "
            f"start without one (restart {self.count} of {self.limit}, cluster.max_restarts)"
        )


def _attempt(
    config: Config, open_ports: OpenPorts, console: Console, resume: str | None, at_start: Hook | None,
    at_end: Hook | None, restarts: _Restarts, lock: Callable[[], RunLock],
) -> RunResult:  # fmt: skip
    started = time.monotonic()
    prompts = run_prompts(config)
    _require_images(config)
    pairs = None
    if config.data.pairs is not None:
        pairs = PairSet(config.data.pairs, size=1).index(absolute=config.data.absolute_pairs)
        console.message("pairs: " + ", ".join(f"{name} {count}" for name, count in pairs.counts.items()))
    resolve("model", MODELS, config.model.type).check(config.model)
    for note in model_notes(config):
        console.message(note)
    long = long_prompts(config, prompts)
    if long:
        console.message(f"warning: {long}" if config.model.long_prompts == "cut" else long)
    ours = lock()
    # Also on a restart: a host that lost its workers may have been disconnected, and its lock taken over.
    ours.require()
    folder, checkpoint = open_run(config, resume)
    folder = replace(folder, require_ours=ours.require)
    if checkpoint is not None:
        console.message(f"continuing from {checkpoint.folder} after {checkpoint.iteration} iterations")
        ended = ending_of(config, checkpoint.state)
        if ended is not None:
            return _ended_before(config, folder, checkpoint, ended, console, started)
    with ExitStack() as stack:
        job = _Job(
            config=config, effective=prepare(config, folder.root / "base", console), folder=folder, prompts=prompts,
            pairs=pairs, console=console, open_ports=open_ports, stack=stack, restarts=restarts, at_start=at_start,
            at_end=at_end,
        )  # fmt: skip
        while True:
            try:
                return job.run(checkpoint)
            except WorkerLostError as error:
                ours.require()
                # Also before all ports are opened again, which would lose it.
                job.kept.save(folder.checkpoints)
                checkpoint = folder.checkpoints.newest()
                if job.ports is None or checkpoint is None or not isinstance(error, LearnerLostError):
                    raise
                restarts.require(error)
                job.ports.learner.renew()


@dataclass(kw_only=True)
class _Job:
    """A run with its input read and its ports, which stay open when only learner ranks are lost."""

    config: Config
    effective: Config
    """With the models and metrics that the run trains first."""
    folder: RunFolder
    prompts: tuple[str, ...]
    pairs: PairIndex | None
    console: Console
    open_ports: OpenPorts
    stack: ExitStack
    """Closes the ports."""
    restarts: _Restarts
    at_start: Hook | None
    at_end: Hook | None
    ports: Ports | None = field(default=None, init=False)
    kept: KeptStates = field(default_factory=KeptStates, init=False)

    def run(self, checkpoint: Checkpoint | None) -> RunResult:
        """Record and train from the start or a checkpoint to the end, and export."""
        started, folder, first = time.monotonic(), self.folder, checkpoint.iteration if checkpoint else 0
        for record in (folder.metrics, folder.guard, folder.skipped):
            truncate_after(record, first)
        tracker, mlflow = _open_tracker(self.config, folder, first)
        tracker.set_tags({"restarts": self.restarts.count})
        status = "FAILED"
        try:
            result = self._train(tracker, checkpoint)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except RunTakenError:
            # Another process holds the lock and writes the records now.
            status = "RUNNING"
            raise
        finally:
            tracker.close(status)
        return RunResult(
            run_dir=folder.root, iterations=result.iterations, metrics=result.last_metrics,
            mlflow_uri=mlflow.uri if mlflow else None, mlflow_run_id=mlflow.run_id if mlflow else None,
            export=folder.export, seconds=time.monotonic() - started, guard=result.guard,
        )  # fmt: skip

    def _train(self, tracker: Tracker, checkpoint: Checkpoint | None) -> loop.LoopResult:
        if self.ports is None:
            self.ports = self.stack.enter_context(self.open_ports(self.effective, tracker))
        effective, folder, prompts = self.effective, self.folder, self.prompts
        ports = replace(self.ports, tracker=tracker, pairs=self.pairs)
        context = RunContext(
            config=effective, ports=ports, folder=folder, prompts=prompts, console=self.console, kept=self.kept
        )
        at_start, at_end = self.at_start, self.at_end
        on_start = (lambda: at_start(effective, ports, prompts)) if at_start else None
        result = loop.run(context, checkpoint=checkpoint, on_start=on_start)
        if at_end is not None:
            at_end(effective, ports, prompts)
        folder.require_ours()
        _finish(effective, folder, tracker, _final_weights(effective, folder, result.iterations, result.guard))
        return result


def model_notes(config: Config) -> list[str]:
    """Return what a user should know of the configured model when a run starts; the family's notes need the model."""
    family, notes = resolve("model", MODELS, config.model.type), []
    slow = [f"model.{key}" for key in ("dtype", "vae_dtype") if getattr(config.model, key, None) == "bfloat16"]
    slow += ["learner.precision"] if config.learner.precision == "bfloat16" else []
    if slow and config.cluster.backend != "ray" and not torch.cuda.is_available() and not computes_bfloat16("cpu"):
        notes.append(
            f"{', '.join(f'{key}=bfloat16' for key in slow)}: this processor does not multiply in bfloat16 "
            "and takes many times as long as in float32; float32 needs twice the memory"
        )
    try:
        return notes + (family.notes(config.model) if hasattr(family, "notes") else [])
    except ModelError:
        # The driver of a cluster may not have the model.
        return notes


def long_prompts(config: Config, prompts: Sequence[str]) -> str | None:
    """Describe the prompts that the text encoders cannot encode at once; None without any."""
    family = resolve("model", MODELS, config.model.type)
    if not hasattr(family, "chunk_counts"):
        return None
    try:
        counts = family.chunk_counts(config.model, [*prompts, config.model.negative_prompt or ""])
    except ModelError:
        # The driver of a cluster may not have the model; its workers report it if they do not have it either.
        return None
    return describe_long(counts, config.model.long_prompts)


def _ended_before(
    config: Config, folder: RunFolder, checkpoint: Checkpoint, ended: Decision, console: Console, started: float
) -> RunResult:
    """Return the result of a run that the guard ended; nothing is trained and no record changes."""
    console.message(
        "the guard has ended this run. Change guard.* to continue from its last weights, or name an earlier checkpoint "
        f"of {folder.root / 'checkpoints'} with --resume"
    )
    if read_export_facts(folder.export) is None:
        # Interrupted between the last checkpoint and the export.
        effective = prepare(config, folder.root / "base", console)
        _export(effective, folder, _final_weights(effective, folder, checkpoint.iteration, ended))
    metrics: dict[str, float] = {}
    for row in read_metrics(folder.metrics)[-2:]:
        metrics |= {name: value for name, value in row.items() if name != "iteration"}
    return RunResult(
        run_dir=folder.root, iterations=checkpoint.iteration, metrics=metrics, mlflow_uri=None, mlflow_run_id=None,
        export=folder.export, seconds=time.monotonic() - started, guard=ended,
    )  # fmt: skip


def _require_images(config: Config) -> None:
    """Read one image before the model loads, so that a wrong column is reported early.

    A shipped configuration may leave data.path to the command line, so the schema cannot require it.
    """
    anchor = getattr(config.algorithm, "anchor", None)
    if config.data.path is None and getattr(anchor, "source", "rollout") == "data":
        raise ConfigError(
            "algorithm.anchor.source is `data`, but data.path is unset: set it to a folder, a parquet file or a "
            "zip archive of real images, or algorithm.anchor.source=rollout."
        )
    if config.data.path is not None:
        load_images(config.data.path, config.data.image_column, 1, None)
        if getattr(anchor, "source", "rollout") == "data" and config.model.conditional:
            _require_captions(config)


def _require_captions(config: Config) -> None:
    data = config.data
    assert data.path is not None
    columns = (data.caption_column,) if data.caption_column else CAPTION_COLUMNS
    images = EncodedImages(data.path, image_column=data.image_column, caption_columns=columns)
    if not any(image.prompt for image in images.read(range(min(len(images), _CAPTIONS_TRIED)))):
        raise ConfigError(
            f"algorithm.anchor.source is `data` and the model takes prompts, but the first images of data.path "
            f"({data.path}) have no caption. Expected a .txt file beside each image, metadata.jsonl, or one of the "
            f"columns {', '.join(columns)} (data.caption_column)."
        )


def _open_tracker(config: Config, folder: RunFolder, first: int):
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
    trackers += optional_trackers(config.tracking, folder.root, config.run.name, config.to_mapping(), first)
    tracker = CompositeTracker(trackers)
    tracker.log_text("resolved.yaml", dump(config))
    return tracker, mlflow


def _final_weights(config: Config, folder: RunFolder, iterations: int, guard: Decision | None) -> FinalWeights:
    """Return the last weights, or after a roll-back the best by the judges.

    Read from the checkpoint, because the learner exports weights in the dtype of the rollout workers.
    """
    best = guard.best_iteration if guard is not None and guard.action == "roll_back" else iterations
    if best == 0 and not (folder.root / "checkpoints" / "000000").is_dir():
        # `roll_back` was set after the start, so there is no checkpoint 0; the base weights are in the model's files.
        family = resolve("model", MODELS, config.model.type).load(config.model, device="cpu", trainable=True)
        weights = {name: value.detach() for name, value in trainable_tensors(family.network).items()}
        return FinalWeights(iteration=0, bundle=make_bundle(0, weights), checkpoint=None)
    found = folder.checkpoints.open(best)
    return FinalWeights(iteration=best, bundle=found.bundle(), checkpoint=found)


def _finish(config: Config, folder: RunFolder, tracker: Tracker, final: FinalWeights) -> None:
    rows = read_metrics(folder.metrics)
    if rows:
        curves = folder.root / "curves.png"
        save_curves(rows, _panels(config), curves)
        tracker.log_image("curves", config.run.iterations, curves)
    _export(config, folder, final)
    tracker.set_tags({"export": str(folder.export)})


def _export(config: Config, folder: RunFolder, final: FinalWeights) -> None:
    export_run(config, folder, final.bundle, iteration=final.iteration, checkpoint=final.checkpoint)


def _panels(config: Config) -> dict[str, list[str]]:
    """Panel title -> metrics of the curves plot."""
    rewards = [f"reward/{entry.name}/mean" for entry in config.rewards.train]
    judges = [f"judge/{entry.name}/mean" for entry in config.rewards.judges]
    return {
        "quality": rewards + judges,
        "drift": ["drift/rms", "drift/budget"],
        "anchor weight": ["anchor/weight"],
        "seconds": ["time/rollout", "time/reward", "time/learn", "time/sync"],
    }


def _versions() -> dict[str, str]:
    found = installed_versions(("acpo-dist", "diffusers", "transformers", "peft", "ray", "deepspeed"))
    return {f"version.{name}": number for name, number in found.items()}
