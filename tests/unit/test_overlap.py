"""While the pool decodes, scores and differentiates, the learner computes what does not depend on the response."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from acpo_dist.training.context import fixed_groups
from acpo_dist.training.local import LocalRewards, LocalRollouts, learner_spec
from acpo_dist.workers.learner.worker import LearnerWorker
from acpo_dist.workers.reward.wire import WireTensor
from acpo_dist.workers.reward.worker import ScoredGradient
from tests.unit.test_skipped_steps import PROMPTS, task_of


class Elsewhere:
    """A pool in another thread that responds once the learner has continued."""

    def __init__(self, config, *, at_once: bool) -> None:
        self._workers = LocalRewards(config, device="cpu")
        self._threads = ThreadPoolExecutor(1)
        self.has_got_on = threading.Event()
        if at_once:
            self.has_got_on.set()

    def submit(self, metric: str, sent: WireTensor, prompts: Sequence[str]) -> Future[ScoredGradient]:
        def compute() -> ScoredGradient:
            if not self.has_got_on.wait(timeout=300):
                raise AssertionError("the learner waits for the answer instead of going on")
            return self._workers.submit(metric, sent, prompts).result()

        return self._threads.submit(compute)


@pytest.mark.parametrize("how", [[], ["algorithm.guidance=full"], ["algorithm.type=draft"]])
def test_the_anchors_forwards_run_before_the_answer_is_there_and_change_nothing(how, tiny, monkeypatch):
    config = tiny("rollout.prompts_per_iteration=4", "learner.global_batch=4", *how)
    handles = LocalRollouts(config, device="cpu").generate(fixed_groups(config, PROMPTS, 4, stream="test"))
    batches, task = [handle.payload for handle in handles], task_of([n for h in handles for n in h.sample_ids])
    found = []
    for at_once in (True, False):
        source = Elsewhere(config, at_once=at_once)
        learner = LearnerWorker(learner_spec(config), source)
        learner.start(None)
        predict, calls = learner.family.predict, []

        def counted(*arguments, predict=predict, calls=calls, source=source):
            calls.append(torch.is_grad_enabled())
            answer = predict(*arguments)
            # The first forward is the policy's own, which the answer is about; the last of all is the anchor's.
            if len(calls) > 1 and not calls[-1]:
                source.has_got_on.set()
            return answer

        monkeypatch.setattr(learner.family, "predict", counted)
        learner.train(batches, task)
        found.append(learner.export(1).tensors)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
