"""The one place that states the version; `setup.py` reads it without importing the package."""

from functools import cache

__version__ = "0.2.0"


@cache
def versions() -> dict[str, str]:
    """Versions of dkv and of what a result depends on, by name."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"dkv": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
