"""Register the best checkpoint of a finished run in the model registry, with a model card and tags."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acpo_dist.analysis.release.model_card import CardFacts, loading_code, model_card
from acpo_dist.analysis.release.verdict import Verdict, gains_of, judge_run, metrics_at, read_evaluation
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import UsageError
from acpo_dist.core.files import replace_file
from acpo_dist.evaluation.suites.subject import BEST, NEWEST, find_checkpoint, prepared
from acpo_dist.tracking.mlflow_registry import ModelVersion, register
from acpo_dist.training.export import default_format, write_weights
from acpo_dist.training.run_folder import git_commit, read_run_config
from acpo_dist.workers.learner.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """Result of a promotion."""

    folder: Path
    iteration: int
    card: Path
    version: ModelVersion
    verdict: Verdict
    forced: bool


def promote(
    run: Path, *, name: str | None, uri: str | None, checkpoint: str = BEST, force: bool = False,
    evaluations: Sequence[Path] = (),
) -> Promotion:  # fmt: skip
    """Register a run's weights as a new version of a model, with a card.

    Args:
        run: folder of a finished run.
        name: name of the registered model; None uses the run's name.
        uri: MLflow tracking URI; None uses the run's.
        checkpoint: `best` (by the judges), `newest`, or an iteration.
        force: register even if the guard is not clean; tags and card state it.
        evaluations: folders of `acpo eval` whose results are added to the card.

    Raises:
        ResumeError: the folder is no run.
        UsageError: the run has not ended, the guard is not clean, or the checkpoint does not exist.
        TrackingError: MLflow cannot be used.
    """
    config = prepared(read_run_config(run), run)
    verdict, newest = judge_run(run, config)
    reports = [read_evaluation(folder) for folder in evaluations]
    if checkpoint == BEST and verdict.best == 0:
        raise UsageError(
            f"{run}: no checkpoint scored higher than the base model with the judges, so there is no best one to "
            f"promote. `--checkpoint {NEWEST} --force` promotes the last weights, and the card states it."
        )
    if not verdict.clean and not force:
        raise UsageError(
            f"{run} is not promoted: {'; '.join(verdict.objections)}. Inspect the run first (`acpo report`); --force "
            "promotes it, and tags and card state these reasons."
        )
    chosen = find_checkpoint(run, config, checkpoint)
    for path, report in zip(evaluations, reports, strict=True):
        _require_of(path, report, chosen)
    folder = _export(run, config, chosen, verdict)
    title = name or config.run.name
    facts = _facts(run, config, chosen, newest, verdict, title, folder, reports)
    card = folder / "README.md"
    replace_file(card, model_card(facts).encode())
    version = register(
        uri=uri or config.tracking.mlflow_uri, run_dir=run, experiment=config.tracking.experiment,
        run_name=config.run.name, model=title, folder=folder, description=card.read_text(encoding="utf-8"),
        tags=_tags(config, chosen, verdict), alias=None if not verdict.clean else "promoted",
    )  # fmt: skip
    return Promotion(
        folder=folder, iteration=chosen.iteration, card=card, version=version, verdict=verdict, forced=not verdict.clean
    )


def _require_of(path: Path, report: Mapping[str, Any], chosen: Checkpoint) -> None:
    """Check that an evaluation for the card measured the weights of the card.

    Raises:
        UsageError: it measured other weights.
    """
    found = report["provenance"]["arms"]["model"].get("policy_sha256")
    if found != chosen.bundle().checksum:
        raise UsageError(
            f"--evaluation {path} measured other weights than iteration {chosen.iteration}, which is to be promoted. "
            f"Evaluate that iteration: `acpo eval RUN --checkpoint {chosen.iteration} …`."
        )


def _export(run: Path, config: Config, chosen: Checkpoint, verdict: Verdict) -> Path:
    """Return the run's own export if it holds this checkpoint, else write one beside it."""
    bundle = chosen.bundle()
    if bundle.checksum == verdict.exported:
        return run / "export"
    folder = run / f"export-{chosen.iteration:06d}"
    layout = default_format(config)
    write_weights(config, bundle, folder, layout=layout, iteration=chosen.iteration, made=chosen.made)
    return folder


def _facts(
    run: Path, config: Config, chosen: Checkpoint, newest: Checkpoint, verdict: Verdict, title: str, folder: Path,
    reports: Sequence[Mapping[str, Any]],
) -> CardFacts:  # fmt: skip
    text = (
        "Clean: no rule was over a limit at the end, and no rule ended the run."
        if verdict.clean
        else "Not clean, see above."
    )
    if verdict.remarks:
        text += " Reported during the run:\n\n" + "\n".join(f"- {remark}" for remark in verdict.remarks)
    lora = next(folder.glob("*.safetensors"), None)
    best = ", the best by its judges" if chosen.iteration == verdict.best else ""
    return CardFacts(
        config=config, name=title, iteration=chosen.iteration, objections=verdict.objections, guard=text,
        metrics=metrics_at(run, chosen.iteration), code=loading_code(config, file=None if not lora else lora.name),
        gains=gains_of(run) if chosen.iteration == newest.iteration else {}, evaluations=reports,
        provenance={
            "run": config.run.name,
            "checkpoint": f"iteration {chosen.iteration}{best}",
            "code": git_commit() or "not a git checkout",
            "weights sha256": chosen.bundle().checksum,
        },
    )  # fmt: skip


def _tags(config: Config, chosen: Checkpoint, verdict: Verdict) -> dict[str, str]:
    tags = {
        "acpo.iteration": str(chosen.iteration),
        "acpo.best_iteration": str(verdict.best),
        "acpo.guard": "clean" if verdict.clean else "not clean",
        "acpo.policy_sha256": chosen.bundle().checksum,
        "acpo.rewards": ", ".join(entry.name for entry in config.rewards.train),
        "acpo.judges": ", ".join(entry.name for entry in config.rewards.judges),
    }
    if not verdict.clean:
        tags |= {"acpo.forced": "true", "acpo.objections": "; ".join(verdict.objections)}
    return tags
