"""What `build` promises for any graph: valid, no wait too many, within the width, as the policies said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling import launch_order, streams
from opara_backend.scheduling.build import build
from opara_backend.scheduling.launch_order import LAUNCH_ORDERS
from opara_backend.scheduling.schedule import Schedule, ScheduleError, verify
from opara_backend.scheduling.streams import STREAM_POLICIES
from tests import reference
from tests.strategies import WIDTHS, graph_of, kernel_graphs, profile_of, profiles, scheduled_graphs

ORDERS = st.sampled_from(["opara", "program"])


@st.composite
def problems(draw: st.DrawFn) -> tuple[KernelGraph, Profile]:
    graph = draw(kernel_graphs())
    return graph, draw(profiles(len(graph)))


@given(scheduled_graphs())
def test_every_policy_makes_valid_schedules(found: tuple[KernelGraph, Schedule]) -> None:
    graph, schedule = found
    verify(graph, schedule)
    assert reference.is_valid(graph, schedule)


@given(problems(), st.sampled_from(["opara", "sequential"]), ORDERS, WIDTHS)
def test_no_wait_can_be_spared(problem: tuple[KernelGraph, Profile], policy: str, order: str, width: int) -> None:
    graph, profile = problem
    schedule = build(graph, profile, policy=policy, launch_order=order, streams=width)
    for kernel, waits in enumerate(schedule.waits):
        assert len(set(waits)) == len(waits)
        for spared in waits:
            fewer = tuple(awaited for awaited in waits if awaited != spared)
            with pytest.raises(ScheduleError):
                verify(graph, replace(schedule, waits=(*schedule.waits[:kernel], fewer, *schedule.waits[kernel + 1 :])))


@given(problems(), ORDERS)
def test_with_streams_enough_the_policies_are_taken_at_their_word(
    problem: tuple[KernelGraph, Profile], order: str
) -> None:
    graph, profile = problem
    schedule = build(graph, profile, policy="opara", launch_order=order, streams=128)
    assert schedule.stream == streams.opara(graph)
    assert schedule.order == LAUNCH_ORDERS[order](graph, profile)
    assert schedule.policy == "opara"


@given(problems(), ORDERS, WIDTHS)
def test_width_is_kept_and_so_are_chains(problem: tuple[KernelGraph, Profile], order: str, width: int) -> None:
    graph, profile = problem
    unbounded = streams.opara(graph)
    schedule = build(graph, profile, policy="opara", launch_order=order, streams=width)
    assert schedule.streams == len(set(schedule.stream)) <= width
    folded = set(zip(unbounded, schedule.stream, strict=True))
    assert len(folded) == len(set(unbounded)), "kernels of one chain came to lie on two streams"


@given(problems(), ORDERS, WIDTHS)
def test_sequential_is_one_stream_in_program_order_without_waits(
    problem: tuple[KernelGraph, Profile], order: str, width: int
) -> None:
    graph, profile = problem
    schedule = build(graph, profile, policy="sequential", launch_order=order, streams=width)
    assert schedule.order == tuple(range(len(graph)))
    assert set(schedule.stream) <= {0}
    assert not schedule.wait_count


@given(problems(), WIDTHS)
def test_the_same_input_gives_the_same_schedule(problem: tuple[KernelGraph, Profile], width: int) -> None:
    graph, profile = problem
    again = KernelGraph.from_json(graph.to_json())
    first = build(graph, profile, policy="opara", launch_order="opara", streams=width)
    assert build(again, profile, policy="opara", launch_order="opara", streams=width) == first


@pytest.mark.parametrize(("unknown", "named"), [({"policy": "wave"}, STREAM_POLICIES), ({"launch_order": "?"}, LAUNCH_ORDERS)])
def test_an_unknown_name_is_answered_with_those_accepted(unknown: dict[str, str], named: dict[str, object]) -> None:
    chosen = {"policy": "opara", "launch_order": "opara", **unknown}
    with pytest.raises(ValueError, match="accepted") as raised:
        build(graph_of(("in", "a")), profile_of(("memory", 1.0)), streams=8, **chosen)  # type: ignore[arg-type]
    assert repr(next(iter(unknown.values()))) in str(raised.value)
    assert all(name in str(raised.value) for name in named)


@pytest.mark.parametrize("width", [0, -1])
def test_a_width_below_one_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {width}"):
        build(graph_of(("in", "a")), profile_of(("memory", 1.0)), policy="opara", launch_order="opara", streams=width)


def test_chains_beyond_the_width_share_the_stream_that_is_free_first() -> None:
    """Three chains on two streams: the third joins the shorter of the two that run."""
    graph = graph_of(("in", "a"), ("in", "b"), ("in", "c"))
    folded = streams.bound_width(graph, (0, 1, 2), (0, 1, 2), (5.0, 1.0, 1.0), 2)
    assert folded == (0, 1, 1)


def test_a_chain_that_can_wait_for_a_busy_stream_opens_no_other() -> None:
    """The last chain starts when the first kernel ends wherever it lies, so it stays beside that kernel."""
    graph = graph_of(("in", "a"), ("a", "b"), ("a", "c"), ("a", "d"))
    assert streams.opara(graph) == (0, 0, 1, 2)
    order = launch_order.program(graph, profile_of(*[("memory", 1.0)] * 4))
    assert streams.bound_width(graph, (0, 0, 1, 2), order, (1.0, 0.0, 0.0, 0.0), 2) == (0, 0, 0, 0)
