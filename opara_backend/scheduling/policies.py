"""Every stream policy and launch order by name, and how one of each becomes a Schedule.

Takes: a KernelGraph, its Profile, names, a width. Gives: a Schedule, verified. Must not change: the graph.
Imports no torch. Errors: ValueError for a name nobody knows, ScheduleError for a policy that is wrong.

A stream policy says which kernels share a stream, and may ask for edges of its own (waves). A launch order then sorts
the kernels so that all edges point forward. Chains beyond the width are folded, waits are added where they are
needed, and the result is checked against reads and writes. Any policy goes with any order.

A policy of your own: a function `(graph, profile, width) -> Allocation`, announced in your package's entry points under
the group `opara_stream_policies`; a launch order `(graph, profile) -> tuple of kernels` under `opara_launch_orders`.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from opara_backend.kernel_graph import Edge, KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling import chains, launch_order, list_scheduling, streams
from opara_backend.scheduling.launch_order import LaunchOrder
from opara_backend.scheduling.schedule import Schedule, ScheduleError, verify, with_waits


@dataclass(frozen=True)
class Allocation:
    """A stream for each kernel, and edges the policy wants beside the graph's own."""

    stream: tuple[int, ...]
    edges: tuple[Edge, ...] = ()


StreamPolicy = Callable[[KernelGraph, Profile, int], Allocation]

BUILT_IN_POLICIES: Mapping[str, StreamPolicy] = MappingProxyType(
    {
        "opara": lambda graph, profile, width: Allocation(streams.opara(graph)),
        "nimble": lambda graph, profile, width: Allocation(chains.nimble(graph)),
        "wavefront": lambda graph, profile, width: Allocation(*list_scheduling.wavefront(graph, width)),
        "list_k": lambda graph, profile, width: Allocation(list_scheduling.list_k(graph, profile, width)),
        "just_in_time": lambda graph, profile, width: Allocation(*list_scheduling.just_in_time(graph, profile, width)),
        "sequential": lambda graph, profile, width: Allocation(streams.sequential(graph)),
    }
)
BUILT_IN_ORDERS: Mapping[str, LaunchOrder] = launch_order.LAUNCH_ORDERS


def stream_policy(name: str) -> StreamPolicy:
    """The policy called `name`, built in or announced by an installed package."""
    found: StreamPolicy = _find(name, BUILT_IN_POLICIES, "opara_stream_policies", "stream policy")
    return found


def order_policy(name: str) -> LaunchOrder:
    """The launch order called `name`, built in or announced by an installed package."""
    found: LaunchOrder = _find(name, BUILT_IN_ORDERS, "opara_launch_orders", "launch order")
    return found


def policy_names() -> tuple[str, ...]:
    """Every stream policy there is."""
    return _names(BUILT_IN_POLICIES, "opara_stream_policies")


def order_names() -> tuple[str, ...]:
    """Every launch order there is."""
    return _names(BUILT_IN_ORDERS, "opara_launch_orders")


def build(graph: KernelGraph, profile: Profile, *, policy: str, launch_order: str, streams: int) -> Schedule:
    """Schedule `graph` by `policy` and `launch_order` on at most `streams` streams, and verify the result."""
    allocate, order = stream_policy(policy), order_policy(launch_order)
    try:
        schedule = draft(graph, profile, allocate, order, streams)
    except ScheduleError:
        raise
    except Exception as error:  # a policy of somebody's own
        raise ScheduleError(f"policy {policy}/{launch_order} raised {type(error).__name__}: {error}") from error
    schedule = replace(schedule, policy=f"{policy}/{launch_order}")
    verify(graph, schedule)
    return schedule


def in_a_row(graph: KernelGraph) -> Schedule:
    """All kernels on one stream, in program order: what policy `sequential` and launch order `program` make."""
    schedule = with_waits(graph, (0,) * len(graph), range(len(graph)), "sequential/program")
    verify(graph, schedule)
    return schedule


def draft(graph: KernelGraph, profile: Profile, policy: StreamPolicy, order_by: LaunchOrder, width: int) -> Schedule:
    """The Schedule, not yet verified."""
    allocation = policy(graph, profile, width)
    if len(allocation.stream) != len(graph):
        raise ValueError(f"the stream policy placed {len(allocation.stream)} kernels of {len(graph)}")
    constrained = replace(graph, edges=(*graph.edges, *allocation.edges)) if allocation.edges else graph
    order = order_by(constrained, profile)
    _check_order(constrained, order)
    stream = streams.bound_width(constrained, allocation.stream, order, profile.durations(), width)
    return with_waits(constrained, stream, order)


def _check_order(graph: KernelGraph, order: tuple[int, ...]) -> None:
    if sorted(order) != list(range(len(graph))):
        raise ScheduleError(f"the launch order must launch each of the {len(graph)} kernels exactly once: {order}")
    place = {kernel: index for index, kernel in enumerate(order)}
    for edge in graph.edges:
        if place[edge.src] > place[edge.dst]:
            first, second = (graph.kernels[k].name for k in (edge.src, edge.dst))
            raise ScheduleError(f"the launch order puts {second} before {first}, which it depends on")


def _find(name: str, built_in: Mapping[str, Any], group: str, what: str) -> Any:
    if name in built_in:
        return built_in[name]
    for entry in importlib.metadata.entry_points(group=group):
        if entry.name == name:
            return entry.load()
    known = _names(built_in, group)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown {what} {name!r}; accepted: {', '.join(known)}{hint}")


def _names(built_in: Mapping[str, Any], group: str) -> tuple[str, ...]:
    others = sorted({entry.name for entry in importlib.metadata.entry_points(group=group)} - set(built_in))
    return (*built_in, *others)
