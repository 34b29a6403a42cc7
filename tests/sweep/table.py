"""The table of a sweep: a journal while it runs, a sorted JSON file at the end.

Takes: results as they come. Gives: `<name>.jsonl`, one line per sample, appended at once, and `<name>.json`, which
says the same in the same order whatever order the results came in. Must not change: lines that are in the journal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.sweep.records import FAULTS, VERDICTS, Case, Result

SCHEMA = 1


class Journal:
    """Results on disk, one line each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[Case, Result]:
        """What is there; a line cut short by the end of a process is left out."""
        found = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            result = Result(**{**row, "case": Case(**row["case"])})
            found[result.case] = result
        return found

    def append(self, results: Iterable[Result]) -> None:
        """Add results, so that they outlive this process."""
        with self.path.open("a") as file:
            file.writelines(json.dumps(asdict(result)) + "\n" for result in results)


def table(results: Iterable[Result], about: Mapping[str, Any], unfinished: Iterable[Case]) -> dict[str, Any]:
    """Counts per verdict and per operator, and every sample that does not plainly agree.

    lowered: samples of which opara scheduled at least one graph; the others ran eagerly, as with any compiler.
    """
    ordered = sorted(results, key=lambda result: result.case)
    operators: dict[str, dict[str, Any]] = {}
    for result in ordered:
        row = operators.setdefault(
            result.case.operator, {"dtype": result.dtype, "samples": 0, "agrees": 0, "lowered": 0, "captured": 0}
        )
        row["dtype"] = row["dtype"] or result.dtype
        row["samples"] += 1
        row["agrees"] += result.verdict == "agrees"
        row["lowered"] += result.graphs > 0
        row["captured"] += result.captured > 0
        if result.fallbacks:
            row["fallbacks"] = dict(sorted((Counter(row.get("fallbacks", {})) + Counter(result.fallbacks)).items()))
    count = Counter(result.verdict for result in ordered)
    left = Counter(case.operator for case in unfinished)
    return {
        "schema": SCHEMA,
        **about,
        "summary": {
            "samples": len(ordered),
            "operators": len(operators),
            **{verdict: count[verdict] for verdict in VERDICTS},
            "lowered": sum(result.graphs > 0 for result in ordered),
            "captured": sum(result.captured > 0 for result in ordered),
            "replayed": sum(result.replays > 0 for result in ordered),
            "compiled_together": sum(result.together > 1 for result in ordered),
            "fallbacks": dict(sorted(sum((Counter(r.fallbacks) for r in ordered), Counter()).items())),
            "unfinished": sum(left.values()),
        },
        "unfinished": dict(sorted(left.items())),
        "exceptions": [_exception(result) for result in ordered if result.verdict != "agrees"],
        "operators": operators,
    }


def _exception(result: Result) -> dict[str, Any]:
    row = {"sample": str(result.case), "verdict": result.verdict, "detail": result.detail}
    return {**row, "inductor": result.theirs} if result.verdict in FAULTS else row


def text(content: Mapping[str, Any]) -> str:
    """The table as JSON, a line per operator and per exception."""
    lines = []
    for key, value in content.items():
        if key == "exceptions":
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            lines.append(f' "exceptions": [\n{rows}\n ]')
        elif key == "operators":
            rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            lines.append(f' "operators": {{\n{rows}\n }}')
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def at_fault(results: Iterable[Result]) -> list[Result]:
    """Those where inductor is right and opara is not."""
    return [result for result in results if result.verdict in FAULTS]
