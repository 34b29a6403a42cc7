"""Puts what is generated into README.md and docs: tables of results and the table of options.

Takes: a page's text. Gives: the same text with what stands between its markers made anew.
Must not change: anything outside the markers. `python -m bench readme` writes it; a test compares.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from bench import layers, starts
from bench.report import TABLES
from bench.samples import Results, load
from opara_backend.options import ACCEPTED, Options

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "options.md", ROOT / "docs" / "results.md")
_RESULTS = re.compile(rf"(<!-- ({'|'.join(TABLES)}): (\S+)( \w+)? -->\n).*?(<!-- end of results -->)", re.DOTALL)
_LAYERS = re.compile(r"(<!-- layers: (\S+) -->\n).*?(<!-- end of layers -->)", re.DOTALL)
_STARTS = re.compile(r"(<!-- first calls: (\S+) -->\n).*?(<!-- end of first calls -->)", re.DOTALL)
_OPTIONS = re.compile(r"(<!-- options -->\n).*?(<!-- end of options -->)", re.DOTALL)


def renewed(text: str) -> str:
    """`text` with its generated parts made from the committed results and from `options.py`."""
    text = _RESULTS.sub(lambda m: f"{m[1]}{TABLES[m[2]](_results(m[3], m[4]))}\n{m[5]}", text)
    text = _LAYERS.sub(lambda m: f"{m[1]}{layers.markdown(ROOT / m[2])}\n{m[3]}", text)
    text = _STARTS.sub(lambda m: f"{m[1]}{starts.markdown(ROOT / m[2])}\n{m[3]}", text)
    return _OPTIONS.sub(lambda m: f"{m[1]}{options_table()}\n{m[2]}", text)


def _results(path: str, only: str | None) -> Results:
    """What lies at `path`; of one dtype or one batch if the marker names one."""
    found = load(ROOT / path)
    if only is None:
        return found
    return replace(found, rows=tuple(r for r in found.rows if only.strip() in (r.dtype, str(r.batch))))


def options_table() -> str:
    """One row an option: name, default, what it takes, meaning."""
    lines = ["| option | default | takes | meaning |", "| --- | --- | --- | --- |"]
    for name, accepts in ACCEPTED.items():
        if accepts.choices is not None:
            takes = ", ".join(f"`{c}`" for c in accepts.choices())
        else:
            takes = f"{accepts.low} to {accepts.high}" if accepts.high else "True, False"
        lines.append(f"| `{name}` | `{getattr(Options(), name)!r}` | {takes} | {accepts.meaning} |")
    return "\n".join(lines)
