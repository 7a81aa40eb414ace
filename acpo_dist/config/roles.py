"""Placement of each role: required resources and labels of machines, and how workers are distributed."""

from typing import Literal

from pydantic import Field

from acpo_dist.config.section import Section


class RoleConfig(Section):
    """Requirements on machines for workers of this role."""

    resources: dict[str, float] = Field(default={})
    """Custom resources that each worker reserves, by their names on the machines, such as `{fast_disk: 1}`."""
    labels: dict[str, str] = Field(default={})
    """Required labels of the machine, in Ray's syntax: `{acpo-role: learner}`, `{zone: in(a,b)}`, `{zone: "!c"}`."""


class LearnerRoleConfig(RoleConfig):
    """The learner gang."""

    strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """PACK uses as few machines as possible, STRICT_PACK one; gradients are exchanged between ranks at every step."""


class RolloutRoleConfig(RoleConfig):
    """The rollout workers; they are distributed over machines."""

    min_workers: int | None = Field(default=None, ge=1)
    """Number of rollout workers with which the run starts and continues; more join when resources allow. None requires
    all rollout.num_workers at the start and one to continue."""
    late_s: float = Field(default=20.0, gt=0)
    """Seconds by which a worker may respond later than the others before its samples are drawn on other workers."""


class RewardRoleConfig(RoleConfig):
    """The reward replicas."""

    near_rollout: bool = True
    """Prefer machines with rollout workers, which hold the images; others are used if these are full."""


class RolesConfig(Section):
    """Placement of each role."""

    learner: LearnerRoleConfig = LearnerRoleConfig()
    rollout: RolloutRoleConfig = RolloutRoleConfig()
    reward: RewardRoleConfig = RewardRoleConfig()
