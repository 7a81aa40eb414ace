"""CONTRIBUTING's claim: a new algorithm is one file, and its `module:Class` in a configuration is enough."""

import math
import textwrap

from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive

# Filtered behaviour cloning: the denoising loss on samples above the batch's median, by score.
OUTSIDER = """
from typing import ClassVar, Literal

from acpo_dist.algorithms.config import NoiseSpaceConfig
from acpo_dist.algorithms.denoising import NoiseSpaceAlgorithm, statistics_of
from acpo_dist.core.types import Selection


class BestHalf(NoiseSpaceAlgorithm):
    class Config(NoiseSpaceConfig):
        type: Literal["outside_acpo:BestHalf"] = "outside_acpo:BestHalf"
        share: float = 0.5
        needs_groups: ClassVar[bool] = True

    def __init__(self, config):
        self.config = config

    def select(self, scored):
        ids = [plan.sample_id for group in scored.groups for plan in group.samples]
        (name,) = scored.weights
        best = sorted(ids, key=lambda one: -scored.qualities[name][one])[: round(self.config.share * len(ids))]
        return Selection(
            sample_ids=tuple(ids), weights={one: float(one in best) for one in ids},
            metrics={"select/kept": float(len(best))},
        )

    def objective(self, batch, network, states, model_output, base):
        error = statistics_of(batch, network, states, model_output, base).policy_error
        return batch.weights_B * error, {"denoising/error": error.detach()}
"""


def test_an_algorithm_in_a_file_of_its_own_trains_with_anchor_and_drift_and_resumes(tiny, tmp_path, monkeypatch):
    (tmp_path / "outside_acpo.py").write_text(textwrap.dedent(OUTSIDER))
    monkeypatch.syspath_prepend(tmp_path)
    root = tmp_path / "run"
    common = (
        "algorithm={type: 'outside_acpo:BestHalf', share: 0.25, anchor: {budget: 0.01}}",
        "rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=4", f"run.dir={root}", "checkpoint.every=1",
    )  # fmt: skip
    drive(tiny(*common, "run.iterations=1"), open_ports, Console(quiet=True))
    drive(tiny(*common, "run.iterations=2"), open_ports, Console(quiet=True), resume="auto")
    rows = read_metrics(root / "metrics.jsonl")[:2]
    assert [row["select/kept"] for row in rows] == [2.0] * 2
    assert all(math.isfinite(row["denoising/error"]) and row["anchor/weight"] > 0 for row in rows)
    assert rows[0]["drift/rms"] == 0.0 < rows[1]["drift/rms"]
