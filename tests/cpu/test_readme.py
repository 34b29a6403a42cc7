"""The README's generated parts are those that the committed results and the options give."""

from __future__ import annotations

from pathlib import Path

from bench.readme import renewed

README = Path(__file__).parent.parent.parent / "README.md"


def test_generated_parts_are_up_to_date() -> None:
    text = README.read_text()
    assert renewed(text) == text, "run `python -m bench readme`"
