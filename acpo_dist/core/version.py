"""Version of this package."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """Installed version of acpo-dist; `unknown` in a source tree that is not installed."""
    try:
        return version("acpo-dist")
    except PackageNotFoundError:
        return "unknown"
