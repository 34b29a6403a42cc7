"""`cache list` and `cache clear`: what this backend left in Inductor's cache directory.

Takes: that directory. Gives: its size and our entries; `clear` removes those, and nothing else: kernels that stock
Inductor may share (`.so`, Triton's) and everybody else's entries stay. Must not change: anything, without `--yes` or
a yes. Programs in a running process are not touched; the next process compiles again.

How ours are told: a generated module ends in `opara_program = Program(...)`; an entry of `fxgraph/` holds that
module's text; an entry of `aotautograd/` names one of those entries; schedules that won have a folder of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opara_backend.commands.console import show_table, size
from opara_backend.options import REMEMBERED

MARK = b"opara_program = Program("
NEWEST = 20  # graphs listed
_KERNEL = re.compile(rb"^    def k\d+\(\):", re.MULTILINE)


@dataclass(frozen=True)
class Module:
    """One generated module of ours: a compiled graph."""

    path: Path
    kernels: int
    nbytes: int
    modified: float


@dataclass(frozen=True)
class Survey:
    """What a cache directory holds. entries: index entries that lead to our modules. schedules: those that won."""

    location: Path
    nbytes: int
    files: int
    modules: tuple[Module, ...]
    entries: tuple[Path, ...]
    schedules: tuple[Path, ...]

    @property
    def own_files(self) -> tuple[Path, ...]:
        """Everything `clear` removes."""
        return (*(module.path for module in self.modules), *self.entries, *self.schedules)

    @property
    def own_bytes(self) -> int:
        """Bytes that `clear` frees."""
        return sum(map(_size_of, self.own_files))


def register(commands: Any) -> None:
    """Add this command."""
    parser = commands.add_parser(
        "cache",
        help="what this backend left in Inductor's cache: list it, clear it",
        description="Compiled programs live in Inductor's cache directory; TORCHINDUCTOR_CACHE_DIR names another.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    lister = actions.add_parser("list", help="location, size, and each compiled graph of this backend")
    lister.add_argument("--json", action="store_true", help="print JSON, with every graph")
    lister.add_argument("--all", action="store_true", help=f"every graph, not only the {NEWEST} newest")
    lister.set_defaults(run=_list)
    clearer = actions.add_parser("clear", help="remove this backend's entries, and only those")
    clearer.add_argument("--yes", action="store_true", help="do not ask")
    clearer.set_defaults(run=_clear)
    for action in (lister, clearer):
        action.add_argument("--directory", type=_directory, help="default: Inductor's own")


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no directory")
    return path


def survey(location: Path | None = None) -> Survey:
    """What is in `location`, by default Inductor's cache directory. Files that vanish meanwhile are left out."""
    if location is None:
        from opara_backend import upstream

        location = upstream.cache_directory()
    files = list(_files(location))
    modules: list[Module] = []
    for path in files:
        if path.suffix == ".py" and (text := _read(path)) is not None and MARK in text:
            with contextlib.suppress(FileNotFoundError):
                facts = path.stat()
                modules.append(Module(path, len(_KERNEL.findall(text)), facts.st_size, facts.st_mtime))
    graphs = [p for p in _under(files, location, "fxgraph") if MARK in (_read(p) or b"")]
    keys = sorted({path.parent.name.encode() for path in graphs})  # an entry is a folder called by its key
    wrappers = _under(files, location, "aotautograd") if keys else []
    naming = [p for p in wrappers if (text := _read(p)) is not None and (MARK in text or any(k in text for k in keys))]
    modules.sort(key=lambda module: (-module.modified, module.path))
    schedules = tuple(p for p in _under(files, location, REMEMBERED) if p.suffix in (".json", ".tmp"))
    return Survey(location, sum(map(_size_of, files)), len(files), tuple(modules), (*graphs, *naming), schedules)


def _files(location: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(location):  # links are not followed
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names))


def _under(files: list[Path], location: Path, kind: str) -> list[Path]:
    return [path for path in files if (location / kind) in path.parents]


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:  # gone, or another user's
        return None


def _size_of(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def remove(found: Survey) -> tuple[int, list[str]]:
    """Remove our files and the folders this empties: how many went, and what could not go."""
    removed, failures = 0, []
    for path in found.own_files:
        try:
            path.unlink()
            removed += 1
        except FileNotFoundError:
            continue
        except OSError as error:
            failures.append(f"{path}: {error.strerror}")
            continue
        for folder in path.parents:
            if folder == found.location:
                break
            try:
                folder.rmdir()
            except OSError:  # not empty
                break
    return removed, failures


def _list(chosen: argparse.Namespace) -> int:
    found = survey(chosen.directory)
    if chosen.json:
        print(json.dumps(as_json(found), indent=1))
        return 0
    rows = [
        (
            str(module.path.relative_to(found.location)),
            str(module.kernels),
            size(module.nbytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(module.modified)),
        )
        for module in (found.modules if chosen.all else found.modules[:NEWEST])
    ]
    if rows:
        show_table("compiled graphs of this backend", ("module", "kernels", "size", "written"), rows)
    if len(rows) < len(found.modules):
        print(f"and {len(found.modules) - len(rows)} older ones; --all lists them")
    print(f"{found.location}: {size(found.nbytes)} in {found.files} files")
    print(f"of this backend: {_counted(found)}")
    return 0


def _counted(found: Survey) -> str:
    modules, entries, schedules = len(found.modules), len(found.entries), len(found.schedules)
    return f"{modules} modules, {entries} index entries, {schedules} schedules, {size(found.own_bytes)}"


def as_json(found: Survey) -> dict[str, Any]:
    """The survey as plain data, versioned."""
    return {
        "schema": 1,
        "location": str(found.location),
        "bytes": found.nbytes,
        "files": found.files,
        "own_bytes": found.own_bytes,
        "index_entries": len(found.entries),
        "schedules": len(found.schedules),
        "modules": [
            {"path": str(m.path), "kernels": m.kernels, "bytes": m.nbytes, "modified": m.modified}
            for m in found.modules
        ],
    }


def _clear(chosen: argparse.Namespace) -> int:
    found = survey(chosen.directory)
    if not found.own_files:
        print(f"nothing of this backend in {found.location}")
        return 0
    what = _counted(found)
    if not chosen.yes:
        if not sys.stdin.isatty():
            print(f"would remove {what} from {found.location}; say --yes to do so", file=sys.stderr)
            return 2
        if input(f"remove {what} from {found.location}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing removed")
            return 1
    removed, failures = remove(found)
    print(f"removed {removed} files from {found.location}; the next process compiles again")
    for failure in failures:
        print(f"could not remove {failure}", file=sys.stderr)
    return 1 if failures else 0
