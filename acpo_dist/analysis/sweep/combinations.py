"""The runs of a sweep: every combination of the given values, with every seed."""

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from acpo_dist.config.load import load_config
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import UsageError, quoted

_OPEN, _CLOSE = "[{(", "]})"
_UNSAFE = re.compile(r"[^A-Za-z0-9._=,+-]+")
_LONGEST = 120
"""Longest name of a combination, in characters: it names a folder."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One point of the grid, without its seed."""

    name: str
    """Short name: the run's name and its folder."""
    overrides: tuple[str, ...]
    """`key=value` texts."""


def split_values(text: str) -> list[str]:
    """Split at commas outside brackets and quotes: `0.1,[1,2]` has two values."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += (letter in _OPEN) - (letter in _CLOSE) if not quote else 0
        if letter == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += letter
    return values


def combinations(axes: Sequence[str], arms: Sequence[str] = ()) -> list[Combination]:
    """Return the grid of all axes and arms, in the order in which they are given.

    Args:
        axes: `key=value,value,...` texts; a key with one value applies to every combination.
        arms: `name=key=value key=value` texts: named sets of overrides, which form one more axis.

    Raises:
        UsageError: a text has another form, or a key or a value occurs twice.
    """
    columns: list[list[tuple[str, tuple[str, ...]]]] = []
    keys = [axis.partition("=")[0].strip() for axis in axes]
    for key, axis in zip(keys, axes, strict=True):
        values = split_values(axis.partition("=")[2])
        if "=" not in axis or not key or "" in values:
            raise UsageError(f"expected `key=value,value`, found {quoted(axis)}")
        if len(set(values)) < len(values) or keys.count(key) > 1:
            raise UsageError(f"{quoted(axis)}: the key or one of its values is given twice")
        short = key.rpartition(".")[2]
        shown = short if [other.rpartition(".")[2] for other in keys].count(short) == 1 else key
        # A key with one value does not distinguish combinations, so it is not part of their names.
        columns.append([(f"{shown}={value}" if len(values) > 1 else "", (f"{key}={value}",)) for value in values])
    if arms:
        columns.append([_arm(text) for text in arms])
    found = []
    for cells in itertools.product(*columns):
        name = ",".join(part for part, _ in cells if part) or "run"
        overrides = tuple(override for _, several in cells for override in several)
        found.append(Combination(name=_UNSAFE.sub("-", name)[:_LONGEST], overrides=overrides))
    names = [combination.name for combination in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two combinations have the same name {quoted(twice[0])}; name them with --arm")
    return found


def configurations(
    source: str | Path, grid: Sequence[Combination], seeds: Sequence[int], root: Path, extra: Sequence[str] = ()
) -> list[Config]:
    """Load the configuration of every run, combination by combination; all are validated.

    Args:
        source: path of a YAML file, or name of a shipped configuration.
        grid: the combinations.
        seeds: values of `run.seed`.
        root: folder of the sweep; a run's folder is `root/NAME/seed-SEED`.
        extra: overrides of every run.

    Raises:
        ConfigError: a combination is not valid.
        UsageError: no seed, or one twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"expected different seeds, found {list(seeds)}")
    return [
        load_config(
            source,
            [
                *extra, *combination.overrides, f"run.name={combination.name}", f"run.seed={seed}",
                f"run.dir={root / combination.name / f'seed-{seed}'}",
            ],
        )
        for combination in grid
        for seed in seeds
    ]  # fmt: skip


def _arm(text: str) -> tuple[str, tuple[str, ...]]:
    name, _, rest = text.partition("=")
    try:
        overrides = tuple(shlex.split(rest))
    except ValueError as error:
        raise UsageError(f"--arm {quoted(text)}: {error}") from error
    if not name or not all("=" in override for override in overrides):
        raise UsageError(f"--arm {quoted(text)}: expected `name=key=value key=value`; `name=` changes nothing")
    return name, overrides
