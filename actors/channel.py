"""The weight channel through the object store: from learner rank 0 to every rollout worker, not through the driver."""

from typing_extensions import override

from acpo_dist.core.ports import WeightChannel
from acpo_dist.core.weights import require_acks
from actors.learner import RayLearner
from actors.rollout import RayRollouts


class RayChannel(WeightChannel):
    """Publishes a version and verifies every acknowledgement."""

    def __init__(self, learner: RayLearner, rollouts: RayRollouts) -> None:
        """Connect learner and rollout workers."""
        self._learner, self._rollouts = learner, rollouts

    @override
    def publish(self, version: int) -> str:
        bundle, checksum = self._learner.export_reference(version)
        require_acks(version, checksum, self._rollouts.load_reference(bundle, version))
        return checksum
