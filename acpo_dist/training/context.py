"""The fixed parts of a run, passed as one argument to the functions that work on all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from acpo_dist.config.schema import Config
from acpo_dist.core.ports import Ports
from acpo_dist.core.types import PromptGroup
from acpo_dist.data.prompts import sample_prompts, size_mix
from acpo_dist.tracking.console import Console
from acpo_dist.training.kept import KeptStates
from acpo_dist.training.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Configuration, ports, folder, prompts, console and kept states of one run; none is replaced during the run."""

    config: Config
    ports: Ports
    folder: RunFolder
    prompts: Sequence[str]
    console: Console
    kept: KeptStates = field(default_factory=KeptStates)


def fixed_groups(config: Config, prompts: Sequence[str], count: int, *, stream: str) -> list[PromptGroup]:
    """Return `count` groups of one sample each, with the same prompts and seeds for every policy version.

    Args:
        count: number of prompts to sample.
        stream: name of the sequence of prompts and seeds; see `sample_prompts`.
    """
    return sample_prompts(
        prompts, iteration=0, run_seed=config.run.seed, num_prompts=count, samples_per_prompt=1, stream=stream,
        mix=size_mix(config),
    )  # fmt: skip
