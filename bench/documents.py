"""Results as JSON files that say which schema they are of.

Takes: a path and a document. Gives: the document. Must not change: anything but the file written. Imports no torch.
Errors: ValueError naming the file and what is wrong with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read(path: Path, *schemas: int | str) -> dict[str, Any]:
    """The document at `path`, which is of one of `schemas`; ValueError if it is not JSON or of another."""
    try:
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    found = document.get("schema") if isinstance(document, dict) else type(document).__name__
    if found not in schemas:
        raise ValueError(f"{path} has schema {found!r}; this version reads {' and '.join(map(str, schemas))}")
    result: dict[str, Any] = document
    return result


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document`, which names its schema, to `path`; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
