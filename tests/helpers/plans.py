"""Plans that tests share."""

from functools import cache

from acpo_dist.config.load import load_config
from acpo_dist.preflight.plan.plan import Plan, make_plan


@cache
def planned(name: str, *overrides: str, device: str = "auto") -> Plan:
    """The plan of a configuration; shared by tests, since full-size SDXL takes many seconds."""
    return make_plan(load_config(name, list(overrides)), device=device)
