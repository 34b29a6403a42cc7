"""Recorded kernel graphs: the committed ones are sound, what is saved comes back, and a bad file says what is wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.recorded import FOLDER, Measured, Recording, RecordingError, load, load_all, save
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.schedule import verify
from tests.gpu_profiles import GPU, LAUNCH
from tests.strategies import graph_of, profile_of, random_profile

FILES = sorted(FOLDER.glob("*.json.gz"))
ABOUT = {"model": "tiny", "dtype": "float16", "batch": 1}


def tiny() -> Recording:
    """Two independent kernels and a third that reads what both wrote, scheduled in two ways."""
    graph = graph_of(("in", "a"), ("in", "b"), ("a b", "c"), outputs=("c",))
    profile = Profile(tuple(LAUNCH.kernel(seconds=1e-6) for _ in range(3)), GPU)
    schedules = [
        build(graph, profile, policy=policy, launch_order="program", streams=2) for policy in ("sequential", "opara")
    ]
    return Recording(ABOUT, graph, profile, tuple(Measured(s, 1e-6 * n) for n, s in enumerate(schedules, start=1)))
