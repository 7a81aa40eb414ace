"""Memory of one worker per role: weights and optimiser computed, activations from the traced phases."""

from dataclasses import asdict, dataclass

GIB = 2**30
BUCKET = 500_000_000
"""Number of elements that DeepSpeed gathers before it reduces them (its default)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one worker in GiB."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    anchor: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts at the peak, in GiB."""
        return self.weights + self.gradients + self.optimizer + self.anchor + self.activations

    def to_mapping(self) -> dict[str, float]:
        """Return JSON-compatible data."""
        return {name: round(value, 4) for name, value in (asdict(self) | {"total": self.total}).items()}


@dataclass(frozen=True, kw_only=True)
class LearnerState:
    """Properties that determine the learner's memory for weights, gradients and optimiser."""

    frozen: int
    """Number of frozen parameters of the network."""
    trainable: int
    frozen_bytes: int
    """Bytes of one frozen parameter."""
    trainable_bytes: int
    zero_stage: int | None
    ranks: int
    eight_bit: bool = False
    """Whether moments take 8 bits per element and a float32 scale per 256 elements."""
    offloaded: bool = False
    """Whether moments and float32 masters are in host memory."""
    narrow: bool
    """Whether DeepSpeed holds the network in bfloat16, with float32 masters."""


def learner_state(state: LearnerState) -> tuple[float, float, float]:
    """Compute the memory of one rank.

    Plain torch: gradients of the parameters' type, two float32 moments. DeepSpeed: stage 1 shards moments and float32
    masters, stage 2 also gradients, stage 3 also weights; gradients pass through a bucket.

    Args:
        state: properties of the learner.

    Returns:
        Bytes as (weights, gradients, optimizer).
    """
    wide = 4 * state.trainable
    if state.zero_stage is None:
        weights = state.frozen * state.frozen_bytes + state.trainable * state.trainable_bytes
        moments = 2 * state.trainable * (1 + 4 / 256) if state.eight_bit else 2 * wide
        return weights, state.trainable * state.trainable_bytes, moments
    stage, ranks = state.zero_stage, state.ranks
    element = 2 if state.narrow else state.trainable_bytes
    weights = state.frozen * (2 if state.narrow else state.frozen_bytes) + state.trainable * element
    gradients = float(state.trainable * element)
    masters = wide if state.narrow or stage > 0 else 0
    optimizer = float(2 * wide + masters)
    if stage >= 1:
        optimizer /= ranks
    if stage >= 2:
        gradients /= ranks
    if stage >= 3:
        weights /= ranks
    if stage >= 1:
        # The bucket, and this rank's float32 share in the optimiser step.
        gradients += min(BUCKET, state.trainable) * element + (0 if state.offloaded else wide / ranks)
    return float(weights), gradients, 0.0 if state.offloaded else optimizer
