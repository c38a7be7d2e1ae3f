"""The programs in docs/python.md run."""

from __future__ import annotations

import re
from pathlib import Path


def test_python_page() -> None:
    page = Path(__file__).parent.parent / "docs/python.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) > 5
    exec(compile("".join(blocks), str(page), "exec"), {})
