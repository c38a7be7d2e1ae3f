"""The programs in docs/python.md run, and the commands of the pages are commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ferrule.cli import _parser

ROOT = Path(__file__).parent.parent


def test_python_page() -> None:
    page = ROOT / "docs/python.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) > 5
    exec(compile("".join(blocks), str(page), "exec"), {})


@pytest.mark.parametrize("page", ["README.md", "docs/raspberry-pi.md", "docs/jetson.md"])
def test_commands(page: str) -> None:
    """Commands have the options that the pages give them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    lines = [line for line in "".join(blocks).splitlines() if line.startswith("ferrule ")]
    assert len(lines) > 3
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        args, more = _parser().parse_known_args(words)
        # As `main`: words behind options belong to the list of words before them.
        assert not more or hasattr(args, "words"), line
        assert not any(word.startswith("-") for word in more), line
