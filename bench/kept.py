"""What a campaign keeps in its folder between one run and the next.

Takes: rows as they are measured, programs as they are compiled. Gives: what is there. Must not change: other files
than `rows.ndjson` and `caches/compiled.ndjson`, one line of JSON an entry.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import models
from bench.precompile import Program
from bench.samples import Results, Row, dumps, row_from


class Kept:
    """The rows in a folder: read at the start, each new one written at once, half a line at the end is dropped."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "rows.ndjson"
        self.compiled_path = folder / "caches" / "compiled.ndjson"
        self.rows = [row_from(data) for data in _lines(self.path)]

    def add(self, rows: Iterable[Row]) -> None:
        """Keep `rows` for good."""
        new = list(rows)
        self.rows.extend(new)
        _append(self.path, [dumps(row) for row in new])

    def drop_problems(self) -> None:
        """Forget every case and process in which something was not reported, so that it is measured again."""
        bad = {(*row.case, row.process) for row in self.rows if row.problem}
        self.rows = [row for row in self.rows if (*row.case, row.process) not in bad]
        self.path.write_text("".join(dumps(row) + "\n" for row in self.rows))

    def compiled(self) -> set[Program]:
        """Case and backend of everything that lies in the caches."""
        return {tuple(entry) for entry in _lines(self.compiled_path)}

    def add_compiled(self, row: Row) -> None:
        """`row`'s program lies in the caches."""
        _append(self.compiled_path, [json.dumps([*row.case, row.backend])])

    def results(self, about: dict[str, Any]) -> Results:
        """As a document, cases of a kind together, in the order of the models whichever was done first."""
        place = {name: index for index, name in enumerate(models.names())}

        def kind(row: Row) -> tuple[str, int, int, int]:
            return (row.dtype, row.batch, row.process, place.get(row.model, len(place)))

        return Results(about, tuple(sorted(self.rows, key=kind)))


def _append(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(line + "\n" for line in lines)


def _lines(path: Path) -> list[Any]:
    """Each line of JSON; a last one that was cut off is taken out of the file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]
