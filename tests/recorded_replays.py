"""Replays recorded under torch.profiler on a GPU, and the kernels and schedule they belong to. Imports no torch."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.recorded import Recording, load
from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import plan_memory
from opara_backend.profiling.occupancy import Launch
from opara_backend.profiling.profile import Profile
from opara_backend.report.build import shape_report
from opara_backend.report.measured import measured, replays
from opara_backend.report.model import GraphReport, Report, Timeline
from opara_backend.report.record import Stages
from opara_backend.scheduling.schedule import Schedule

FOLDER = Path(__file__).parent / "data"
GRAPHS = Path(__file__).parent.parent / "bench" / "kernel_graphs"
NAMES = ("googlenet", "moe_decode")


@dataclass(frozen=True)
class Replays:
    """A graph on one device, its schedule, and what the profiler wrote about three replays of it."""

    about: Mapping[str, str]
    graph: KernelGraph
    profile: Profile
    schedule: Schedule
    modules: tuple[tuple[str, str], ...]
    events: tuple[dict[str, Any], ...]

    @property
    def launches(self) -> list[tuple[Launch, ...]]:
        return [kernel.launches for kernel in self.profile.kernels]

    def timeline(self) -> Timeline | None:
        return measured(self.graph, self.schedule, self.launches, replays(self.events))


@functools.cache
def recorded(name: str) -> Replays:
    document = json.loads(gzip.decompress((FOLDER / f"replays-{name}-float16.json.gz").read_bytes()))
    # Kernels and durations of another session; launches of kernels that were tuned anew are those of the trace.
    base: Recording = load(GRAPHS / f"{name}-float16.json.gz")
    kernels = tuple(
        type(old)(
            duration=new["duration"],
            demand=new["demand"],
            memory_bound=new["memory_bound"],
            launches=tuple(
                Launch(**{**launch, "grid": tuple(launch["grid"]), "block": tuple(launch["block"])})
                for launch in new["launches"]
            ),
            nbytes=new["nbytes"],
        )
        for old, new in zip(base.profile.kernels, document["profile"]["kernels"], strict=True)
    )
    plan = document["schedule"]
    return Replays(
        about=document["about"],
        graph=KernelGraph.from_json(json.dumps(document["graph"])),
        profile=Profile(kernels, base.profile.device),
        schedule=Schedule(
            tuple(plan["stream"]), tuple(plan["order"]), tuple(map(tuple, plan["waits"])), plan["policy"]
        ),
        modules=tuple((path, kind) for path, kind in document["modules"]),
        events=tuple(document["traceEvents"]),
    )


@functools.cache
def report_of(name: str) -> Report:
    """The report that `explain` would have made of a recording."""
    found = recorded(name)
    memory = plan_memory(found.graph, found.schedule)
    shape = shape_report(found.graph, found.profile, found.schedule, memory=memory, measured=found.timeline())
    graph = GraphReport(
        device=found.graph.device,
        segments=found.graph.segments,
        symbols=found.graph.symbols,
        edges=tuple((e.src, e.dst, e.kind, e.buffer) for e in found.graph.edges),
        replays=3,
        other_calls=1,
        hit_rate=0.75,
        stages=Stages(),
        fallbacks=(),
        shapes=(shape,),
    )
    model = {"googlenet": "GoogLeNet", "moe_decode": "MoE decoder"}[name]
    versions = (("torch", found.about["torch"]),)
    return Report(model, found.about["device"], versions, graphs=(graph,), modules=found.modules)
