"""Version of this package."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """Return the installed version of acpo-dist, or `unknown` if it is not installed."""
    try:
        return version("acpo-dist")
    except PackageNotFoundError:
        return "unknown"
