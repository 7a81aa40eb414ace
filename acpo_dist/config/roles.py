"""Which machines of a cluster a role may use, and how its workers lie to one another."""

from typing import Literal

from pydantic import Field

from acpo_dist.config.section import Section


class RoleConfig(Section):
    """What a machine must have for a worker of this role."""

    resources: dict[str, float] = Field(default={})
    """Custom resources that each worker takes, as machines offer them, such as `{fast_disk: 1}`."""
    labels: dict[str, str] = Field(default={})
    """Labels that the machine must have, in Ray's words: `{acpo-role: learner}`, `{zone: in(a,b)}`, `{zone: "!c"}`."""


class LearnerRoleConfig(RoleConfig):
    """The learner gang."""

    strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """PACK takes as few machines as it can, STRICT_PACK one; gradients travel between ranks at every step."""


class RolloutRoleConfig(RoleConfig):
    """The rollout workers; they are spread over machines."""

    min_workers: int | None = Field(default=None, ge=1)
    """The run starts, and goes on, with so many of rollout.num_workers; more join when there is room. None wants all at
    the start and one to go on."""
    late_s: float = Field(default=20.0, gt=0)
    """A worker that answers so much later than the others is left out until it does, and its samples are drawn again
    elsewhere."""


class RewardRoleConfig(RoleConfig):
    """The reward replicas."""

    near_rollout: bool = True
    """Prefer machines with rollout workers, where the images are; others are taken when these are full."""


class RolesConfig(Section):
    """Where each role runs."""

    learner: LearnerRoleConfig = LearnerRoleConfig()
    rollout: RolloutRoleConfig = RolloutRoleConfig()
    reward: RewardRoleConfig = RewardRoleConfig()
