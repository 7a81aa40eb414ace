"""The weight channel through the object store: learner rank 0 to every rollout worker, nothing through the driver."""

from acpo_dist.core.weights import require_acks
from actors.learner import RayLearner
from actors.rollout import RayRollouts


class RayChannel:
    """Publishes a version and checks every echo."""

    def __init__(self, learner: RayLearner, rollouts: RayRollouts) -> None:
        """Connect the two ends."""
        self._learner, self._rollouts = learner, rollouts

    def publish(self, version: int) -> str:
        """See `WeightChannel.publish`."""
        bundle, checksum = self._learner.export_reference(version)
        require_acks(version, checksum, self._rollouts.load_reference(bundle, version))
        return checksum
