"""The generated parts of README and docs are those that the committed results and the options give."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.readme import PAGES, renewed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert renewed(text) == text, "run `python -m bench readme`"
    assert "| `annotate` |" in text
