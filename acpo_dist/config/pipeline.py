"""Whether rollouts and learner work in turns or at the same time."""

from pydantic import Field

from acpo_dist.config.section import Section


class PipelineConfig(Section):
    """Overlap of rollouts with the learner."""

    max_staleness: int = Field(default=0, ge=0, le=2)
    """Versions by which the weights that draw an iteration's samples may be older than those that train on them. 0:
    rollouts and learner take turns. 1 or 2: that many iterations are drawn and scored ahead while the learner works;
    gradients of rewards are still computed with the current weights."""
