"""A run on a latent critic on Ray: its replica scores latents by reference, as the one in process does."""

import pytest

from acpo_dist.config.load import load_config
from acpo_dist.rewards.naming import metric_section
from acpo_dist.rewards.training.critic import CriticSettings
from acpo_dist.tracking.console import Console
from acpo_dist.training.distil import distil
from acpo_dist.training.local import LocalRollouts
from acpo_dist.training.run import drive
from tests.conftest import TINY
from tests.helpers.grids import require_same_grids
from tests.helpers.runs import results

pytestmark = pytest.mark.ray
QUIET = Console(quiet=True)
SMALL = [
    *TINY, "sampler.num_steps=3", "rollout.cpus_per_worker=0.1", "rewards.cpus_per_replica=0.1",
    "learner.cpus_per_rank=0.2", "cluster.worker_timeout_s=900", "rewards.judges=[{type: two_stream}]",
]  # fmt: skip


def test_a_run_on_a_critic_gives_the_metrics_and_images_of_one_process_on_ray(cluster, tmp_path):
    from acpo_dist.training.local import open_ports as local_ports
    from actors.launch import open_ports as ray_ports

    config, file = load_config("toy_sdxl", [*SMALL, "rewards.judges=[]"]), tmp_path / "critic.safetensors"
    distil(
        metric_section("two_stream", "METRIC"), config, LocalRollouts(config, device="cpu"), file,
        CriticSettings(width=8, steps=20, batch_size=8), count=8, console=QUIET,
    )  # fmt: skip
    options = [*SMALL, f"rewards.train=[{{type: latent_critic, weights: {file}}}]", "run.iterations=1"]
    found = {}
    for name, ports, more in (("local", local_ports, []), ("ray", ray_ports, ["rollout.num_workers=2"])):
        drive(load_config("toy_sdxl", [*options, *more, f"run.dir={tmp_path / name}"]), ports, QUIET)
        found[name] = results(tmp_path / name)[0]
    assert "reward/latent_critic/mean" in found["ray"] and found["ray"].keys() == found["local"].keys()
    for name, value in found["local"].items():
        assert found["ray"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    require_same_grids(tmp_path / "local", tmp_path / "ray")
