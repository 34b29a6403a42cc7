"""What commands print: a table, drawn by rich where it is installed and in plain columns where it is not.

Takes: a title, headings, rows of text. Gives: text on standard output. Must not change: anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def show_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one table."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _show_plainly(title, headings, rows)
        return
    console = Console()
    if not console.is_terminal:  # a file or a pipe is as wide as the text; cut lines help nobody
        console.width = 200
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # as it is: square brackets are no markup
    console.print(table)


def _show_plainly(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    print(title)
    for row in (headings, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def positive(text: str) -> int:
    """For argparse: a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} given, a number of at least 1 accepted")
    return int(text)


def size(nbytes: int) -> str:
    """`nbytes` for people."""
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"
