"""Recorded kernel graphs: what a model was lowered to and what was measured, for work without a GPU.

Takes: files `bench/kernel_graphs/*.json.gz` written on a GPU. Gives: `Recording`s. Imports no torch.
Must not change: the files. Errors: RecordingError naming the file and what is wrong with it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opara_backend import codec
from opara_backend.kernel_graph import KernelGraph, KernelGraphError
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.schedule import Schedule

SCHEMA = 1
FOLDER = Path(__file__).parent / "kernel_graphs"


class RecordingError(ValueError):
    """A file that is no recording this version can read."""


@dataclass(frozen=True)
class Measured:
    """One schedule and the GPU seconds one replay of it took."""

    schedule: Schedule
    seconds: float


@dataclass(frozen=True)
class Recording:
    """One model on one device. about: model, dtype, batch, device, driver, versions, commit."""

    about: Mapping[str, Any]
    graph: KernelGraph
    profile: Profile
    measured: tuple[Measured, ...]

    @property
    def name(self) -> str:
        """Model and element type, as the file is called."""
        return f"{self.about['model']}-{self.about['dtype']}"


def save(recording: Recording, folder: Path = FOLDER) -> Path:
    """Write `recording` to `folder`, compressed; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "schema": SCHEMA,
        "about": dict(recording.about),
        "graph": json.loads(recording.graph.to_json()),
        "profile": asdict(recording.profile),
        "measured": [asdict(m) for m in recording.measured],
    }
    path = folder / f"{recording.name}.json.gz"
    text = json.dumps(document, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))  # the same recording gives the same bytes
    return path


def load(path: Path) -> Recording:
    """Read and check one recording."""
    try:
        document = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, zlib.error, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordingError(f"{path}: not a compressed JSON file: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise RecordingError(f"{path}: schema {found!r} found, {SCHEMA} accepted; record it again")
    try:
        graph = KernelGraph.from_json(json.dumps(document["graph"]))
        graph.verify()
        profile: Profile = codec.decoded(document["profile"], Profile, "profile")
        measured = tuple(
            Measured(codec.decoded(m["schedule"], Schedule, "schedule"), float(m["seconds"]))
            for m in document["measured"]
        )
        about = dict(document["about"])
    except (KeyError, TypeError, ValueError, KernelGraphError) as error:
        raise RecordingError(f"{path}: {type(error).__name__}: {error}") from error
    if len(profile.kernels) != len(graph):
        raise RecordingError(f"{path}: {len(profile.kernels)} kernels profiled, the graph has {len(graph)}")
    return Recording(about, graph, profile, measured)


def load_all(folder: Path = FOLDER) -> tuple[Recording, ...]:
    """Every recording in `folder`, by name."""
    return tuple(load(path) for path in sorted(folder.glob("*.json.gz")))
