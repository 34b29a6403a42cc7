"""Fenced blocks of the READMEs and of `docs/`, so that tests can run what they show.

A comment right before a block says how it is tested: `<!-- test: gpu -->` needs a GPU, `<!-- test: slow -->` runs
with `tox -e docs`, `<!-- test: needs ... -->` what no test machine is sure to have. Without one it runs everywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md")
_BLOCK = re.compile(r"(?:^<!-- test: ([^\n]*) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block. mark: how it is tested; heading: the section it stands in."""

    page: str
    line: int
    language: str
    mark: str
    heading: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def compiled(self, text: str | None = None) -> object:
        """The block as code whose errors name the page and its line."""
        return compile("\n" * self.line + (text or self.text), self.page, "exec")


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of `page`."""
    text, found = page.read_text(), []
    for match in _BLOCK.finditer(text):
        before = text[: match.start(2)]
        headings = re.findall(r"^#+ (.+)$", before, re.MULTILINE)
        name = str(page.relative_to(ROOT))
        found.append(
            Block(name, before.count("\n") + 1, match[2], match[1] or "", headings[-1] if headings else "", match[3])
        )
    return found


def all_blocks(*languages: str) -> list[Block]:
    """Those of every page that are in one of `languages`."""
    return [block for page in PAGES for block in blocks(page) if block.language in languages]
