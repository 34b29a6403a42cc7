"""Candidates for the best schedule, ranked by what the simulator predicts.

Takes: a KernelGraph and its Profile, how many candidates may be tried, a width. Gives: schedules to measure, one
stream first, then the most promising. Must not change: anything. Imports no torch. Deterministic.

The simulator only decides what is worth measuring; what is kept is decided by what the device took (`kept`). One stream
is always among the candidates, so the result is not slower than the same kernels in a row, but for the little that
`kept` gives up for less memory. Where kernels fill the
GPU the simulator knows little, so the schedules that others would have made are among them as well (`RIVALS`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.in_place import written_in_place
from opara_backend.scheduling.launch_order import random
from opara_backend.scheduling.policies import build, draft, in_a_row, stream_policy
from opara_backend.scheduling.schedule import Schedule, verify
from opara_backend.scheduling.simulator import simulator

Dish = tuple[str, str, int | None]
"""A policy, a launch order and a number of streams; None stands for the width allowed."""

# Few streams first: they were best most often.
MENU: tuple[Dish, ...] = (
    ("list_k", "critical_path", 4),
    ("opara", "opara", None),
    ("list_k", "critical_path", 3),
    ("nimble", "critical_path", 4),
    ("list_k", "critical_path", None),
    ("opara", "critical_path", 4),
    ("list_k", "opara", 4),
    ("nimble", "opara", None),
    ("list_k", "program", 4),
    ("opara", "program", None),
    ("list_k", "critical_path", 2),
    ("nimble", "program", 4),
    ("list_k", "critical_path", 6),
    ("opara", "opara", 4),
    ("just_in_time", "critical_path", 4),
    ("just_in_time", "critical_path", 3),
    ("just_in_time", "critical_path", None),
    ("just_in_time", "program", 4),
    ("just_in_time", "critical_path", 2),
    ("wavefront", "critical_path", None),
    ("wavefront", "program", 4),
    ("wavefront", "opara", None),
)
# What those who propose a policy would launch, the paper first.
RIVALS: tuple[Dish, ...] = (("opara", "opara", None), ("nimble", "opara", None), ("wavefront", "opara", None))
RANDOM_CANDIDATES = 240
PATIENCE = 10_000  # kernels placed to find candidates, all dishes but `RIVALS` together: large graphs have fewer made
FEW = 3  # candidates of several streams from which on one is tried with kernels that write in place, too
NOISE = 1.005  # times the fastest: what is measured closer together changes places when measured again


def candidates(
    graph: KernelGraph,
    profile: Profile,
    *,
    count: int,
    streams: int,
    near: Schedule | None = None,
    in_place: bool = True,
    fit: Callable[[Schedule], Schedule | None] = lambda schedule: schedule,
) -> tuple[Schedule, ...]:
    """At most `count` different schedules on at most `streams` streams: one stream, the best predicted, `RIVALS`.

    Half of them are the best predicted; then come the rivals, and others as predicted. fit: makes of a schedule of
    several streams one that may be tried, which is itself if it may; or None.
    near: what won for other sizes of the same graph. It comes second, and half as many others are tried beside it.
    in_place: where kernels could write over more of what they read if they waited for others, the best predicted comes
    that way as well, last.
    """
    if near is not None and 1 < near.streams <= streams and count > 1:
        verify(graph, near)
        near = _fitted(near, fit)
        if near is not None:
            tried, count = count, max(2, count // 2 + 1)
            first, *rest = candidates(graph, profile, count=count, streams=streams, in_place=in_place, fit=fit)
            return (first, near, *(other for other in rest if other.launches != near.launches))[:tried]
    sequential = in_a_row(graph)
    others: dict[tuple[object, ...], Schedule] = {}
    dishes: dict[tuple[object, ...], Dish] = {}
    rivals: set[tuple[object, ...]] = set()
    refused = False
    dishes_made = _dishes(len(graph))
    for dish in dishes_made:
        built = _built(graph, profile, dish, streams)
        if built is None or built.streams <= 1:
            continue
        schedule = _fitted(built, fit)
        refused = refused or schedule is not built
        if schedule is not None:
            others.setdefault(schedule.launches, schedule)
            dishes.setdefault(schedule.launches, dish)
            if dish in RIVALS:
                rivals.add(schedule.launches)
    # Else there is nothing to run side by side, or hardly anything fits, or no time for more.
    if others and not refused and len(dishes_made) == len(MENU):
        for schedule in _random(graph, profile, streams):
            if len(others) >= count - 1:
                break
            if schedule.streams > 1 and fit(schedule) is schedule:
                others.setdefault(schedule.launches, schedule)
    ranked = list(others.values())
    device = profile.device
    if device is not None and len(ranked) >= count:
        predicted = simulator(graph, profile, device)
        ranked.sort(key=lambda schedule: predicted(schedule).makespan)
        ranked = _rivals_in_front(ranked, rivals, count // 2)
    ranked = ranked[: max(0, count - 1)]
    waiting = written_in_place(graph) if in_place and len(ranked) >= FEW and ranked[0].launches in dishes else graph
    if waiting is not graph:
        patient = _built(waiting, profile, dishes[ranked[0].launches], streams)
        known = {schedule.launches for schedule in ranked}
        patient = _fitted(patient, fit) if patient is not None and patient.streams > 1 else None
        if patient is not None and patient.launches not in known:
            if len(ranked) > count - 2:
                left_out = [schedule for schedule in ranked[1:] if schedule.launches not in rivals] or ranked[1:]
                ranked.remove(left_out[-1])
            ranked.append(replace(patient, policy=f"{patient.policy}, in place"))
    return (sequential, *ranked)


def kept(candidates: Sequence[Schedule], nbytes: Sequence[int], seconds: Sequence[float]) -> int:
    """Which candidate to keep: of those as fast as the fastest, the one that takes the least memory.

    nbytes: that each one takes. seconds: measured, per replay.
    """
    fastest = min(seconds)
    alike = [i for i in range(len(seconds)) if seconds[i] <= NOISE * fastest]
    return min(alike, key=lambda i: (nbytes[i], candidates[i].streams, seconds[i], i))


def _rivals_in_front(ranked: Sequence[Schedule], rivals: Set[tuple[object, ...]], best: int) -> list[Schedule]:
    """`ranked` with those whose launches are among `rivals` brought forward, behind the `best` first."""
    rest = sorted(ranked[best:], key=lambda schedule: schedule.launches not in rivals)
    return [*ranked[:best], *rest]


def _dishes(kernels: int) -> tuple[Dish, ...]:
    """The first of `MENU`, as many as there is `PATIENCE` for, and `RIVALS`."""
    return tuple(dict.fromkeys((*MENU[: PATIENCE // max(1, kernels)], *RIVALS)))


def _fitted(schedule: Schedule, fit: Callable[[Schedule], Schedule | None]) -> Schedule | None:
    """What `fit` makes of `schedule`; None if that runs on one stream."""
    found = fit(schedule)
    return found if found is not None and found.streams > 1 else None


def _built(graph: KernelGraph, profile: Profile, dish: Dish, streams: int) -> Schedule | None:
    policy, order, width = dish
    if width is not None and width > streams:
        return None
    return build(graph, profile, policy=policy, launch_order=order, streams=width or streams)


def _random(graph: KernelGraph, profile: Profile, streams: int) -> Iterator[Schedule]:
    for seed in range(RANDOM_CANDIDATES):
        base = stream_policy("list_k" if seed % 2 else "opara")
        width = min(streams, (4, 8, 3)[seed % 3])
        schedule = draft(graph, profile, base, functools.partial(random, seed=seed), width)
        schedule = replace(schedule, policy=f"{'list_k' if seed % 2 else 'opara'}/random:{seed}")
        verify(graph, schedule)
        yield schedule
