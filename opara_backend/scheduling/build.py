"""Policies by name -> a verified Schedule.

Takes: a KernelGraph, its Profile, the names of a stream policy and a launch order, and how many streams are allowed.
Gives: a Schedule that `verify` accepted. Must not change: the graph. Imports no torch.
"""

from __future__ import annotations

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.launch_order import LAUNCH_ORDERS
from opara_backend.scheduling.schedule import Schedule, verify, with_waits
from opara_backend.scheduling.streams import STREAM_POLICIES, bound_width


def build(graph: KernelGraph, profile: Profile, *, policy: str, launch_order: str, streams: int) -> Schedule:
    """Schedule `graph` by `policy` (see `streams`) and `launch_order` (see `launch_order`) on at most `streams`.

    Raises ValueError for an unknown name, ScheduleError if the result is not valid (a bug).
    """
    if policy not in STREAM_POLICIES:
        raise ValueError(f"unknown stream policy {policy!r}; accepted: {', '.join(STREAM_POLICIES)}")
    if launch_order not in LAUNCH_ORDERS:
        raise ValueError(f"unknown launch order {launch_order!r}; accepted: {', '.join(LAUNCH_ORDERS)}")
    order = LAUNCH_ORDERS["program" if policy == "sequential" else launch_order](graph, profile)
    stream = STREAM_POLICIES[policy](graph)
    stream = bound_width(graph, stream, order, profile.durations(), streams)
    schedule = with_waits(graph, stream, order, policy)
    verify(graph, schedule)
    return schedule
