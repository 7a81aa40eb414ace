"""Check libraries: presence, versions and importability."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from acpo_dist.preflight.doctor.finding import Finding, in_child

DISTRIBUTION = "acpo-dist"
_EXTRAS = {
    "ray": "several processes or machines",
    "zero": "DeepSpeed ZeRO ranks",
    "mlflow": "MLflow",
    "pyiqa": "the metrics of pyiqa (PolyForm Noncommercial)",
    "eight-bit": "learner.optimizer=adamw_8bit",
}
"""Extra -> purpose."""
_MODULES = {"pyyaml": "yaml", "pillow": "PIL"}
"""Distributions whose module has a different name."""
_IMPORT = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
_AT_ONCE = 4
_NOT_IMPORTED = {"setuptools"}
"""Distributions that only other libraries import; only their version is checked."""


def check_packages() -> Iterator[Finding]:
    """Check the required libraries together, and each extra separately."""
    try:
        wanted = wanted_packages()
    except PackageNotFoundError:
        yield Finding("libraries", "note", f"{DISTRIBUTION} runs without being installed, so versions are not compared")
        return
    # Each import runs in a separate process; they take most of this command's time.
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        found = [threads.submit(compare_installed, "libraries", wanted[""], "")]
        found += [
            threads.submit(compare_installed, f"extra `{name}`", wanted[name], use, name)
            for name, use in _EXTRAS.items()
        ]
        for one in found:
            yield one.result()


def check_torchvision() -> Iterator[Finding]:
    """Check torchvision, which pyiqa and parts of transformers require; a release for another torch breaks both."""
    try:
        found = f"torchvision {version('torchvision')} beside torch {version('torch')}"
    except PackageNotFoundError:
        return
    done = in_child("import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.ones(1), 0.5)")
    if done.succeeded:
        yield Finding("torchvision", "ok", found)
    else:
        yield Finding(
            "torchvision", "failed", f"{found}: {done.text}",
            "Install both from one index in one command: pip install --force-reinstall torch torchvision",
        )  # fmt: skip


def wanted_packages() -> dict[str, list[Requirement]]:
    """Return requirements by extra; the key "" holds the requirements of every installation."""
    found: dict[str, list[Requirement]] = {name: [] for name in ("", *_EXTRAS)}
    for text in requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        for extra, members in found.items():
            marker = requirement.marker
            needed = marker is None if not extra else marker is not None and marker.evaluate({"extra": extra})
            if needed and requirement.name != DISTRIBUTION:
                members.append(requirement)
    return found


def compare_installed(name: str, wanted: list[Requirement], use: str, extra: str = "") -> Finding:
    """Compare an installed distribution with its requirements.

    Args:
        name: name of the finding.
        wanted: requirements.
        use: purpose of an optional extra; empty for required libraries.
        extra: name of the extra.

    Returns:
        The finding.
    """
    install = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install {DISTRIBUTION}"
    there: dict[str, str] = {}
    for requirement in wanted:
        try:
            there[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            continue
    absent = [requirement.name for requirement in wanted if requirement.name not in there]
    if absent:
        verdict, what = ("note", f"for {use}: ") if extra else ("failed", "")
        return Finding(name, verdict, f"{what}{', '.join(absent)} not installed", install)
    found = ", ".join(f"{one} {there[one]}" for one in there)
    odd = [
        f"{one.name} {there[one.name]} instead of {one.specifier}"
        for one in wanted
        if not one.specifier.contains(there[one.name], prereleases=True)
    ]
    modules = [_MODULES.get(one, one.replace("-", "_")) for one in there if one not in _NOT_IMPORTED]
    done = in_child(_IMPORT, *modules)
    if not done.succeeded:
        return Finding(name, "failed", f"cannot be imported: {done.text} ({found})", f"{install} --force-reinstall")
    return Finding(name, "warning", "; ".join(odd), install) if odd else Finding(name, "ok", found)
