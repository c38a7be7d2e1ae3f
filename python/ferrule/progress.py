"""Shows how far a load is: a line on a terminal, or the user's function."""

from __future__ import annotations

import sys
from collections.abc import Callable

from .results import Progress


class Bar:
    """For a `with` around the load; gives the function to call, if there is one to call."""

    def __init__(self, progress: bool | Callable[[Progress], object]) -> None:
        self._progress = progress
        self._shown = False

    def __enter__(self) -> Callable[[int, int], object] | None:
        if callable(self._progress):
            user = self._progress
            return lambda done, total: user(Progress(done, total))
        return self._draw if self._progress and sys.stderr and sys.stderr.isatty() else None

    def _draw(self, done: int, total: int) -> None:
        from shutil import get_terminal_size  # slow to import

        self._shown = True
        text = f" {done / 1e6:.0f}/{total / 1e6:.0f} MB"
        # A line that is wrapped would not be written over.
        width = max(1, min(30, get_terminal_size().columns - len("loading []") - len(text) - 1))
        filled = width * done // max(total, 1)
        sys.stderr.write(f"\rloading [{'=' * filled}{' ' * (width - filled)}]{text}")
        sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class Steps:
    """For a `with` around work of several kinds; gives the function to call, if there is one."""

    def __init__(self, progress: bool | Callable[[str, int, int], object]) -> None:
        self._progress = progress
        self._shown = False

    def __enter__(self) -> Callable[[str, int, int], object] | None:
        if callable(self._progress):
            return self._progress
        return self._draw if self._progress and sys.stderr and sys.stderr.isatty() else None

    def _draw(self, what: str, done: int, total: int) -> None:
        self._shown = True
        sys.stderr.write(f"\r\x1b[K{what} {100 * done // max(total, 1)} %")
        sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
