"""Schedules that won, on disk: a new process finds them there and neither profiles nor searches.

Takes: a graph with sizes bound, options, the device. Gives: a `Winner` that an earlier search left, or nothing; where
a graph was lowered in several ways, the `Choice` among them.
Must not change: files of others. One file per graph, shape, device, set of versions and options, in `opara/` beside
Inductor's own caches; written whole or not at all, so processes may share the folder.

What cannot be read, or is of another version, is no winner: it is said in the log and searched anew. What is read is
verified like any schedule before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opara_backend import codec, upstream
from opara_backend._version import __version__
from opara_backend.execution.program import Program
from opara_backend.kernel_graph import KernelGraph
from opara_backend.options import REMEMBERED, Options
from opara_backend.profiling.device import current_device_spec
from opara_backend.profiling.profile import Profile
from opara_backend.report.record import Timed
from opara_backend.scheduling.policies import BUILT_IN_ORDERS, BUILT_IN_POLICIES
from opara_backend.scheduling.schedule import Schedule, ScheduleError, verify

log = logging.getLogger(__name__)

SCHEMA = 1
# Options that decide what a search finds; the others only change how calls are served.
DECISIVE = ("policy", "order", "streams", "candidates", "search_seconds", "extra_memory", "in_place")


@dataclass(frozen=True)
class Winner:
    """What a search found out: how long kernels take, the schedule kept, those tried with their seconds per replay."""

    profile: Profile
    schedule: Schedule
    tried: tuple[tuple[Schedule, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """Which of a graph's lowerings was kept, by the name of its generated module, and all that were timed."""

    source: str
    lowerings: tuple[Timed, ...]


def place(program: Program, graph: KernelGraph, shape: object, options: Options) -> Path | None:
    """The file for `graph` (sizes bound) of `shape`; None if nothing is to be kept, by our option or Inductor's.

    Nor is what somebody's own policy does: its name says nothing of how it has changed since.
    """
    own = options.policy not in ("auto", *BUILT_IN_POLICIES) or options.launch_order not in BUILT_IN_ORDERS
    if own or not options.remember or upstream.inductor_config.force_disable_caches:
        return None
    device = torch.device(graph.device)
    what = (
        (SCHEMA, __version__, torch.__version__, torch.version.cuda, _triton()),
        current_device_spec(device.index),
        [(name, getattr(options, name)) for name in DECISIVE],
        (torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")),  # what libraries take
        (program.source, program.graph_json, repr(shape)),
        [(b.name, b.nbytes) for b in graph.buffers],
    )
    name = hashlib.sha256(repr(what).encode()).hexdigest()[:32]
    return upstream.cache_directory() / REMEMBERED / f"{name}.json"


def find(path: Path | None, graph: KernelGraph) -> Winner | None:
    """The winner in `path`; None if there is none that this version can read. Its schedule is yet to be verified, those
    that were tried are."""
    winner: Winner | None = _read(path, Winner, "winner")
    if winner is None:
        return None
    if len(winner.profile.kernels) != len(graph) or winner.schedule.streams > len(graph):
        log.info("searching anew: what is remembered is about another graph: %s", path)
        return None
    tried = tuple((schedule, seconds) for schedule, seconds in winner.tried if _is_valid(graph, schedule))
    return replace(winner, tried=tried)


def find_choice(path: Path | None) -> Choice | None:
    """The choice in `path`; None if there is none that this version can read."""
    choice: Choice | None = _read(path, Choice, "choice")
    return choice


def _read(path: Path | None, kind: type, what: str) -> Any:
    if path is None:
        return None
    try:
        return codec.load(path.read_text(), kind, SCHEMA, what)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, codec.FormatError) as error:
        log.info("searching anew: what is remembered cannot be read: %s: %s", path, error)
        return None


def _is_valid(graph: KernelGraph, schedule: Schedule) -> bool:
    try:
        verify(graph, schedule)
    except ScheduleError:
        return False
    return True


def keep(path: Path | None, found: Winner | Choice) -> None:
    """Write what was `found` to `path`. Where that cannot be, it is said and nothing else happens."""
    if path is None:
        return
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(descriptor, "w") as file:
            file.write(codec.dump(found, SCHEMA))
        os.replace(temporary, path)
    except OSError as error:
        log.info("what was found is not remembered: %s", error)
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _triton() -> str:
    """Its version; nothing where a build of torch has it under another name."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("triton")
    return ""
