"""The split of a run's GPUs between rollouts, rewards and learner that leaves least of them idle."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from acpo_dist.config.schema import Config

ROLES = ("rollout", "reward", "learner")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Devices by role, and what an iteration takes with them."""

    devices: dict[str, int]
    seconds: float
    """Seconds of one iteration."""
    idle: float
    """Share of all device seconds in which a device has no work."""

    def to_mapping(self) -> dict[str, float]:
        """Return JSON-compatible data."""
        return {**self.devices, "seconds": self.seconds, "idle": self.idle}


def iteration_seconds(seconds: Mapping[str, float], *, overlapped: bool) -> float:
    """Return the seconds of one iteration.

    Args:
        seconds: by role, each with its own devices.
        overlapped: rollouts of the next iteration are drawn while the learner works. The learner waits for the reward
            gradients of its own micro-batches, so these two stay in sequence.
    """
    training = seconds["reward"] + seconds["learner"]
    return max(seconds["rollout"], training) if overlapped else seconds["rollout"] + training


def splits(config: Config, seconds: Mapping[str, float], devices: Mapping[str, int]) -> dict[str, Split]:
    """Compare the configured split with the best ones for the same number of devices.

    Args:
        config: configuration of the run.
        seconds: seconds per iteration by role, as configured.
        devices: devices by role, as configured.

    Returns:
        `configured`, and the best split of a `synchronous` and of an `overlapped` run.
    """
    work = {role: seconds[role] * devices[role] for role in ROLES}

    def split(given: Mapping[str, int], *, overlapped: bool) -> Split:
        whole = iteration_seconds({role: work[role] / given[role] for role in ROLES}, overlapped=overlapped)
        busy = sum(work.values()) / (whole * sum(given.values())) if whole else 0.0
        return Split(devices=dict(given), seconds=whole, idle=1 - busy)

    found = {"configured": split(devices, overlapped=config.pipeline.max_staleness > 0)}
    for name in ("synchronous", "overlapped"):
        ways = [split(given, overlapped=name == "overlapped") for given in _ways(config, sum(devices.values()))]
        if ways:
            found[name] = min(ways, key=lambda way: way.seconds)
    return found


def _ways(config: Config, total: int) -> Iterator[dict[str, int]]:
    learner = config.learner
    for ranks in range(1, total - 1):
        # Ranks share a global batch in whole micro-batches.
        if learner.global_batch % (learner.micro_batch * ranks):
            continue
        for rewards in range(1, total - ranks):
            yield {"rollout": total - ranks - rewards, "reward": rewards, "learner": ranks}
