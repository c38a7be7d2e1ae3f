"""The folder for what can be made again: packed weights, and what `ferrule tune` found."""

from __future__ import annotations

import os


def cache_dir(choice: bool | str | os.PathLike[str]) -> str | None:
    """The folder that `weight_cache` means."""
    if choice is False:
        return None
    return default_cache_dir() if choice is True else os.fspath(choice)


def default_cache_dir() -> str:
    """The folder for what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "ferrule")
