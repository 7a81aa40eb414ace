"""For any fault of replicas, no request is lost, none is scored 0, and every score is the undisturbed one."""

import contextlib
import os
import signal

import pytest
import torch

from acpo_dist.core.errors import RewardConfigError, RewardError
from acpo_dist.core.types import RolloutHandle
from tests.helpers.data import DATA, needs
from tests.helpers.pools import IMAGES, EndlessLoad, acpo, handle_of, images, until

pytestmark = pytest.mark.ray

REQUESTS = 100
REAL = DATA / "drawbench_sd14_512px.parquet"
FAULTY = "faulty"


@pytest.fixture(scope="module")
def load(cluster) -> list[RolloutHandle]:
    return [handle_of(cluster, index, images(index)) for index in range(REQUESTS)]


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def faulty(pool_of, faults):
    metric = {"type": "tests.helpers.misbehaving:Misbehaving", "name": FAULTY, "folder": str(faults), "seconds": 0.01}
    return pool_of(
        "acpo-00000001",
        {
            "train": [metric], "judges": [], "cut": "image", "replicas": 2, "cpus_per_replica": 0.1,
            "attempt_timeout_s": 3, "deadline_s": 100, "pool": {FAULTY: {"max_batch": 2 * IMAGES}},
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(faulty, load) -> dict[str, float]:
    """Scores of the undisturbed pool; equal to one process."""
    from acpo_dist.rewards.statistics import sharpness

    scores = faulty.score(load, [FAULTY])[FAULTY]
    wanted = torch.cat([sharpness(images(index).float() / 255) for index in range(REQUESTS)])
    torch.testing.assert_close(torch.tensor(list(scores.values())), wanted, rtol=1e-5, atol=0)
    assert len(scores) == REQUESTS * IMAGES and min(scores.values()) > 0
    return dict(scores)


def assert_same(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert list(found) == list(wanted)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_the_pool_opens_no_port(faulty):
    from ray import serve

    assert faulty.vitals()[FAULTY] and serve.status().applications and serve.status().proxies == {}


def whole(pool) -> bool:
    vitals = pool.vitals()[FAULTY]
    return len(vitals) == 2 and not any(one["sick"] for one in vitals)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [("hang", "lost"), ("nan", "nonfinite"), ("nan_on_requests", "nonfinite"), ("memory", "memory")],
)
def test_a_faulty_replica_under_load_loses_no_request_and_is_replaced(
    fault: str, cause: str, faulty, load, undisturbed, faults
):
    until(lambda: whole(faulty))
    before, started = faulty.counters(), {one["pid"] for one in faulty.vitals()[FAULTY]}
    asked = []

    def begin(count: int) -> None:
        asked.append(count)
        if len(asked) == REQUESTS // 10:
            (faults / fault).touch()

    scores = faulty.score(load, [FAULTY], begin)[FAULTY]
    assert_same(scores, undisturbed)
    (bad,) = [int(path.suffix[1:]) for path in faults.glob(f"{fault}.*")]
    assert bad in started
    after = faulty.counters()
    assert after[f"reward_pool/retries/{cause}"] > before[f"reward_pool/retries/{cause}"]
    assert after["reward_pool/requests"] - before["reward_pool/requests"] == REQUESTS
    assert after["reward_pool/unanswered"] == 0
    # Nobody trusts it again: Serve has put another in its place.
    until(lambda: whole(faulty) and bad not in {one["pid"] for one in faulty.vitals()[FAULTY]})


def test_a_batch_that_does_not_fit_into_memory_is_halved_without_a_retry(faulty, load, undisturbed, faults):
    until(lambda: whole(faulty))
    before = faulty.counters()["reward_pool/retries"]
    (faults / "memory_of_batches").touch()
    assert_same(faulty.score(load, [FAULTY])[FAULTY], undisturbed)
    assert list(faults.glob("memory_of_batches.*"))
    assert faulty.counters()["reward_pool/retries"] == before


def test_sigkill_of_any_replica_again_and_again_under_load_loses_nothing(faulty, load, undisturbed):
    until(lambda: whole(faulty))
    before, killed, answers = faulty.counters(), [], []

    def kill(count: int) -> None:
        answers.append(count)
        if len(answers) in (10, 30, 50):
            victim = next((one["pid"] for one in faulty.vitals()[FAULTY] if one["pid"] not in killed), None)
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

    assert_same(faulty.score(load, [FAULTY], kill)[FAULTY], undisturbed)
    assert len(killed) >= 2
    after = faulty.counters()
    # On a slow machine the attempt's timeout can pass before Ray reports the loss.
    causes = [f"reward_pool/retries/{cause}" for cause in ("lost", "timeout")]
    assert sum(after[cause] - before[cause] for cause in causes) >= len(killed)
    assert after["reward_pool/unanswered"] == 0


def test_a_frozen_process_costs_its_requests_one_attempt_each(faulty, load, undisturbed):
    until(lambda: whole(faulty))
    victim = faulty.vitals()[FAULTY][0]["pid"]
    before = faulty.counters()
    os.kill(victim, signal.SIGSTOP)
    try:
        assert_same(faulty.score(load, [FAULTY])[FAULTY], undisturbed)
    finally:
        os.kill(victim, signal.SIGKILL)
    after = faulty.counters()
    assert after["reward_pool/retries/timeout"] > before["reward_pool/retries/timeout"]


def test_an_image_that_no_replica_can_score_is_an_error_and_ends_no_replica(cluster, faulty):
    until(lambda: whole(faulty))
    before = {one["pid"] for one in faulty.vitals()[FAULTY]}
    with pytest.raises(RewardError, match="needs images of at least 3 x 3, found 2 x 2"):
        faulty.score([handle_of(cluster, 0, images(0, size=2))], [FAULTY])
    assert {one["pid"] for one in faulty.vitals()[FAULTY]} == before


# Any number of replicas gives the same


@pytest.fixture(scope="module")
def plain(pool_of):
    return pool_of(
        "acpo-00000002",
        {
            "train": [{"type": "two_stream"}], "judges": [{"type": "sharpness"}], "replicas": 1,
            "cpus_per_replica": 0.1, "wire_dtype": "float16", "pool": {"sharpness": {"max_batch": 4}},
        },
    )  # fmt: skip


def test_scaling_from_one_to_four_and_back_under_load_loses_no_request_and_restarts_no_replica(plain, load):
    first = plain.vitals()["sharpness"][0]["pid"]
    wanted = dict(plain.score(load, ["sharpness"])["sharpness"])
    before, sizes = plain.counters(), []
    with contextlib.closing(EndlessLoad(plain, load, "sharpness")) as under_way:
        for replicas in (4, 1):
            answer = acpo("rewards", "scale", "sharpness", str(replicas), "--run", "acpo-00000002")
            assert answer["running"] == replicas
            (status,) = [
                pool
                for pool in acpo("rewards", "status", "--run", "acpo-00000002")["pools"]
                if pool["metric"] == "sharpness"
            ]
            sizes.append(len(status["replicas"]))
            assert (status["min_replicas"], status["max_replicas"]) == (replicas, replicas)
            under_way.another_round()
    assert sizes == [4, 1]
    assert len(under_way.tables) >= 2
    for table in under_way.tables:
        assert_same(table, wanted)
    assert plain.counters()["reward_pool/unanswered"] == before["reward_pool/unanswered"]
    pids = {one["pid"] for one in plain.vitals()["sharpness"]}
    assert len(pids) == 1 and first in pids


@needs(REAL.name)
def test_real_images_score_the_same_in_one_process_and_on_one_replica_and_three(cluster, plain):
    from acpo_dist.data.images import read_images
    from acpo_dist.rewards.statistics import sharpness

    images = torch.stack([image for _, image in read_images([REAL])])
    assert len(images) == 200
    images = images[::4]
    wanted = torch.cat([sharpness(part.float() / 255) for part in images.split(1)])
    for replicas in (1, 3):
        acpo("rewards", "scale", "sharpness", str(replicas), "--run", "acpo-00000002")
        for size in (1, 7):
            handles = [handle_of(cluster, index, part) for index, part in enumerate(images.split(size))]
            found = torch.tensor(list(plain.score(handles, ["sharpness"])["sharpness"].values()))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    acpo("rewards", "scale", "sharpness", "1", "--run", "acpo-00000002")


def test_gradients_from_the_pool_equal_autograd_in_one_graph_for_any_batch(plain):
    from acpo_dist.models.sdxl import SdxlFamily
    from acpo_dist.objective.perceptual import clip_pixels
    from acpo_dist.rewards.metrics import TwoStreamMetric
    from acpo_dist.workers.reward.wire import pack, unpack

    generator = torch.Generator().manual_seed(0)
    sent = [pack(torch.randn(2, 4, 8, 8, generator=generator), "float16") for _ in range(6)]
    # All at once, so that the replica joins them.
    answers = [plain.client.submit("two_stream", part, ("", "")) for part in sent]
    decoder, metric = (
        SdxlFamily.load_decoder(SdxlFamily.Config(path="toy-sdxl"), device="cpu"),
        TwoStreamMetric(TwoStreamMetric.Config()),
    )
    for part, answer in zip(sent, answers, strict=True):
        latents = unpack(part).requires_grad_(True)
        scores = metric(clip_pixels(decoder.decode(latents), ascend=True), ["", ""])
        (gradient,) = torch.autograd.grad(scores.sum(), latents)
        torch.testing.assert_close(torch.tensor(answer.result().scores), scores.detach(), rtol=1e-5, atol=0)
        # What was computed is right to 1e-5; half precision then rounds each number by at most 2^-11 of the largest.
        found, wanted = unpack(answer.result().gradient), unpack(pack(gradient, "float16"))
        error = (found - gradient).flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
        assert float(error.max()) < 5e-4
        assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def test_counters_report_latencies_and_utilisation(plain, load):
    # The replicas of the tests before leave.
    until(lambda: plain.counters()["reward_pool/sharpness/replicas"] == 1)
    plain.score(load, ["sharpness"])
    metrics = plain.counters()
    assert 0 < metrics["reward_pool/sharpness/latency_p50"] <= metrics["reward_pool/sharpness/latency_p95"] < 60
    assert metrics["reward_pool/sharpness/replicas"] == 1
    assert IMAGES <= metrics["reward_pool/sharpness/batch"] <= 4
    assert 0 < metrics["reward_pool/sharpness/utilisation"] < 1
    assert "reward_pool/two_stream/latency_p50" not in metrics


def test_a_pool_whose_replacements_are_refused_at_their_start_names_the_reason_at_once(faulty, load, faults):
    (faults / "refuse").touch()
    for replica in faulty.vitals()[FAULTY]:
        os.kill(replica["pid"], signal.SIGKILL)
    with pytest.raises(RewardConfigError, match="cannot load the metric"):
        faulty.score(load[:1], [FAULTY])
