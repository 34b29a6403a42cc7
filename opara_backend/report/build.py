"""GraphRecord -> GraphReports.

Takes: a record of a graph that has been called, and a device to estimate for where only a CPU ran it. Gives: plain
data. Must not change: the record. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opara_backend.fallback import Fallback, why_host
from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import MemoryPlan
from opara_backend.profiling import occupancy as occ
from opara_backend.profiling.device import DeviceSpec
from opara_backend.profiling.profile import KernelProfile, Profile
from opara_backend.report import model
from opara_backend.report.estimate import estimated_profile
from opara_backend.report.hazards import wait_rows
from opara_backend.report.record import GraphRecord, Stages
from opara_backend.report.timelines import critical_chain, predicted
from opara_backend.scheduling.bounds import critical_path, work_bound
from opara_backend.scheduling.gaps import gap_of
from opara_backend.scheduling.policies import in_a_row
from opara_backend.scheduling.schedule import Schedule
from opara_backend.scheduling.simulator import simulate

if TYPE_CHECKING:
    from opara_backend.execution.host import Plan

NOT_CHOSEN = (
    "nothing is chosen on a CPU: this is the paper's schedule. On a GPU, auto measures several, one stream among them"
)
REMEMBERED = "profile, candidates and schedule come from an earlier search (option remember)"

Key = tuple[Any, ...]
Tried = Sequence[tuple[Schedule, float]]


def graph_reports(record: GraphRecord, estimate_for: DeviceSpec) -> tuple[model.GraphReport, ...]:
    """Everything known about one graph, by the lowerings kept for its shapes: one, nearly always.

    A graph that was never planned is shown in program order.
    """
    found = [_graph_report(record, rewrites, keys, estimate_for) for rewrites, keys in by_lowering(record).items()]
    first, *others = found or [_graph_report(record, record.rewrites, (), estimate_for)]
    return (first, *(replace(o, replays=0, other_calls=0, hit_rate=0.0, stages=Stages(), fallbacks=()) for o in others))


def by_lowering(record: GraphRecord) -> dict[tuple[str, ...], list[Key]]:
    """The shapes that are planned, by the rewrites in what they run by."""
    found: dict[tuple[str, ...], list[Key]] = {}
    for key in record.plans:
        found.setdefault(record.rewrites_of(key), []).append(key)
    return found


def _graph_report(
    record: GraphRecord, rewrites: tuple[str, ...], keys: Sequence[Key], estimate_for: DeviceSpec
) -> model.GraphReport:
    shapes = [_planned_shape(record, key, rewrites, estimate_for) for key in keys]
    if not shapes and record.graph.kernels:
        shapes = [_unplanned_shape(record.graph, estimate_for)]
    graph = record.plans[keys[0]][0].graph if keys else record.graph
    return model.GraphReport(
        device=graph.device,
        segments=graph.segments,
        symbols=graph.symbols,
        edges=tuple((e.src, e.dst, e.kind, e.buffer) for e in graph.edges),
        replays=record.replays,
        other_calls=record.other_calls,
        hit_rate=record.hit_rate,
        stages=record.stages,
        fallbacks=(*map(fallback_row, record.fallbacks), *_foreseen(record)),
        shapes=tuple(shapes),
        rewrites=rewrites,
    )


def _planned_shape(
    record: GraphRecord, key: Key, rewrites: tuple[str, ...], estimate_for: DeviceSpec
) -> model.ShapeReport:
    plan, captured = record.plans[key]
    shape = planned_shape(shape_name(key), plan, captured, record.candidates.get(key, ()), estimate_for)
    notes = [REMEMBERED] if key in record.remembered else []
    if record.options.policy == "auto" and record.graph.device == "cpu":
        notes.append(NOT_CHOSEN)
    rows = [model.LoweringRow(t.rewrites, t.seconds, t.rewrites == rewrites) for t in record.lowerings.get(key, ())]
    return replace(shape, lowerings=tuple(rows), notes=(*shape.notes, *notes))


def fallback_row(step: Fallback) -> model.FallbackRow:
    """A step down, with the user's line where its detail names one."""
    _, found, source = step.detail.rpartition(" at ")
    return model.FallbackRow(
        step.reason.value, step.detail, step.reason.remedy, step.error, source if found and ":" in source else ""
    )


def _foreseen(record: GraphRecord) -> list[model.FallbackRow]:
    """Steps down that a graph on the CPU, where nothing is captured, would take on a GPU."""
    step = why_host(record.graph) if record.graph.device == "cpu" else None
    return [fallback_row(Fallback(*step))] if step is not None else []


def shape_name(key: tuple[Any, ...]) -> str:
    """A shape's key for people."""
    parts = []
    for part in key:
        sizes = part[0] if isinstance(part, tuple) and part else None
        parts.append("x".join(map(str, sizes)) if sizes is not None else str(part))
    return ", ".join(parts) if parts else "static"


def planned_shape(
    shape: str,
    plan: Plan,
    captured: bool,
    tried: Tried,
    estimate_for: DeviceSpec,
) -> model.ShapeReport:
    """How a shape with a Plan runs."""
    own = plan.profile
    estimated = own.device is None
    profile = estimated_profile(plan.graph, estimate_for) if estimated else own
    return shape_report(
        plan.graph,
        profile,
        plan.schedule,
        shape=shape,
        state="captured" if captured else "in order",
        tried=tried,
        memory=plan.memory,
        pool=plan.pool,
        host_seconds=own.durations() if estimated else None,
    )


def _unplanned_shape(graph: KernelGraph, estimate_for: DeviceSpec) -> model.ShapeReport:
    profile = estimated_profile(graph, estimate_for)
    schedule = in_a_row(graph)
    return shape_report(graph, profile, schedule, shape="any", state="unplanned", host_seconds=())


def shape_report(
    graph: KernelGraph,
    profile: Profile,
    schedule: Schedule,
    *,
    shape: str = "static",
    state: str = "captured",
    tried: Tried = (),
    memory: MemoryPlan | None = None,
    pool: Mapping[int, int] | None = None,
    host_seconds: Sequence[float] | None = None,
    measured: model.Timeline | None = None,
) -> model.ShapeReport:
    """All about one shape. host_seconds: given where `profile` is an estimate (empty: nothing was timed at all)."""
    device = profile.device
    estimated = host_seconds is not None
    name = device.name if device is not None else graph.device
    chain = critical_chain(graph, profile.durations())
    planned = predicted(graph, profile, schedule, estimated=estimated) if state != "unplanned" else ()
    timelines = (*planned, *([measured] if measured is not None else []))
    return model.ShapeReport(
        shape=shape,
        state=state,
        policy=schedule.policy,
        streams=schedule.streams,
        basis=f"estimated for {name}" if estimated else f"measured on {name}",
        estimated=estimated,
        kernels=_kernel_rows(graph, profile, schedule, chain, host_seconds),
        waits=wait_rows(graph, schedule),
        candidates=_candidate_rows(graph, profile, schedule, tried),
        bound=_bound(graph, profile, schedule, tried, timelines) if state != "unplanned" else None,
        memory=_memory(memory, pool),
        critical=chain,
        timelines=timelines,
        notes=_notes(profile, estimated),
    )


def _notes(profile: Profile, estimated: bool) -> tuple[str, ...]:
    notes = []
    if estimated and profile.device is not None:
        notes.append(
            f"ran on a CPU: durations and demands are estimated for {profile.device.name} from bytes and operations"
        )
    elif not any(k.launches for k in profile.kernels):
        notes.append("launch parameters are unknown: install cuda-bindings")
    if profile.device is not None and profile.device.estimated:
        notes.append(
            f"rates of {profile.device.name} are guessed from a similar GPU's, and with them what is predicted"
        )
    return tuple(notes)


def _kernel_rows(
    graph: KernelGraph,
    profile: Profile,
    schedule: Schedule,
    chain: Sequence[int],
    host_seconds: Sequence[float] | None,
) -> tuple[model.KernelRow, ...]:
    place = {kernel: index for index, kernel in enumerate(schedule.order)}
    critical = set(chain)
    rows = []
    for index, (kernel, found) in enumerate(zip(graph.kernels, profile.kernels, strict=True)):
        rows.append(
            model.KernelRow(
                name=kernel.name,
                call=kernel.call,
                kind=kernel.kind,
                dtype=kernel.dtype,
                module=kernel.module,
                source=kernel.source,
                stream=schedule.stream[index],
                position=place[index],
                segment=max(i for i, start in enumerate(graph.segments) if start <= index),
                seconds=found.duration,
                host_seconds=host_seconds[index] if host_seconds else None,
                memory_bound=found.memory_bound,
                flops=kernel.flops,
                nbytes=found.nbytes,
                critical=index in critical,
                launches=_launch_rows(found, profile.device),
            )
        )
    return tuple(rows)


def _launch_rows(kernel: KernelProfile, device: DeviceSpec | None) -> tuple[model.LaunchRow, ...]:
    if device is None:
        return ()
    return tuple(
        model.LaunchRow(
            grid=launch.grid,
            block=launch.block,
            registers=launch.registers,
            shared_memory=launch.shared_memory,
            blocks_per_sm=occ.blocks_per_sm(launch, device),
            limited_by=occ.limiter(launch, device),
            occupancy=occ.occupancy(launch, device),
            waves=occ.waves(launch, device),
            share=occ.gpu_share(launch, device),
        )
        for launch in kernel.launches
    )


def _candidate_rows(
    graph: KernelGraph, profile: Profile, schedule: Schedule, tried: Tried
) -> tuple[model.CandidateRow, ...]:
    shown: Sequence[tuple[Schedule, float | None]] = tried or [(schedule, None)]
    return tuple(
        model.CandidateRow(
            policy=one.policy,
            streams=one.streams,
            waits=one.wait_count,
            predicted=simulate(graph, profile, one, profile.device).makespan if profile.device is not None else None,
            measured=seconds,
            chosen=one == schedule,
        )
        for one, seconds in shown
    )


def _bound(
    graph: KernelGraph, profile: Profile, schedule: Schedule, tried: Tried, timelines: Sequence[model.Timeline]
) -> model.BoundRow:
    path, work = critical_path(graph, profile), work_bound(profile)
    guess = next((t.makespan for t in timelines if t.kind == "plan"), None)
    measured = next((seconds for one, seconds in tried if one == schedule), None)
    taken, bound = measured if measured is not None else guess, max(path, work)
    parts = gap_of(graph, profile, schedule, taken) if taken is not None else None
    return model.BoundRow(
        critical_path=path,
        work=work,
        dominant="critical path" if path >= work else "work",
        predicted=guess,
        measured=measured,
        gap=taken / bound - 1 if taken is not None and bound else None,
        streams=parts.streams if parts is not None else None,
        launch=parts.launch if parts is not None else None,
        contention=parts.contention if parts is not None else None,
    )


def _memory(plan: MemoryPlan | None, pool: Mapping[int, int] | None) -> model.MemoryRow | None:
    if plan is None:
        return None
    wanted = plan.requested_bytes
    saved = 1 - plan.arena_bytes / wanted if wanted else 0.0
    libraries = None if pool is None else tuple(nbytes for _, nbytes in sorted(pool.items()) if nbytes)
    return model.MemoryRow(plan.arena_bytes, wanted, max(0.0, saved), len(plan.placements), libraries)
