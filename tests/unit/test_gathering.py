"""Library kernels gathered on few streams: nothing else about a schedule changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from opara_backend.kernel_graph import KernelGraph
from opara_backend.scheduling.gathering import gathered, library_kernels, on_fewer_streams, renumbered
from opara_backend.scheduling.schedule import Schedule, happens_before, verify, with_waits
from tests.strategies import graph_with_edges, scheduled_graphs


def used_by(schedule: Schedule, kernels: Collection[int]) -> set[int]:
    return {schedule.stream[kernel] for kernel in kernels}


def calls(kernels: Collection[int]) -> dict[int, int]:
    """Library kernels that ask for nothing."""
    return dict.fromkeys(kernels, 0)


@st.composite
def problems(draw: st.DrawFn) -> tuple[KernelGraph, Schedule, Mapping[int, int]]:
    """A scheduled graph, and some of its kernels, which call libraries."""
    graph, schedule = draw(scheduled_graphs())
    return (
        graph,
        schedule,
        draw(st.dictionaries(st.sampled_from(range(len(graph))), st.integers(0, 3))) if len(graph) else {},
    )


@given(problems())
def test_the_same_kernels_may_run_side_by_side(problem: tuple[KernelGraph, Schedule, Mapping[int, int]]) -> None:
    graph, schedule, libraries = problem
    found = gathered(schedule, libraries)
    verify(graph, found)
    assert (found.order, found.policy) == (schedule.order, schedule.policy)
    before, after = happens_before(schedule), happens_before(found)
    pairs = [(one, other) for one in range(len(graph)) for other in range(len(graph))]
    assert [before.ordered(*pair) for pair in pairs] == [after.ordered(*pair) for pair in pairs]


@given(problems())
def test_on_no_more_streams_those_of_libraries_first(problem: tuple[KernelGraph, Schedule, Mapping[int, int]]) -> None:
    _, schedule, libraries = problem
    found = gathered(schedule, libraries)
    assert found.streams <= schedule.streams
    assert len(used_by(found, libraries)) <= len(used_by(schedule, libraries))
    assert used_by(found, libraries) == set(range(len(used_by(found, libraries))))
    assert gathered(found, libraries) == found, "once is enough for what a policy makes"


@given(problems())
def test_no_wait_can_be_spared(problem: tuple[KernelGraph, Schedule, Mapping[int, int]]) -> None:
    _, schedule, libraries = problem
    found = gathered(schedule, libraries)
    before = happens_before(found)
    for kernel, waits in enumerate(found.waits):
        last = [k for k in found.order[: found.order.index(kernel)] if found.stream[k] == found.stream[kernel]][-1:]
        for awaited in waits:
            others = [*last, *(w for w in waits if w != awaited)]
            assert awaited not in last
            assert not any(before.ordered(awaited, other) for other in others)


def test_a_chain_of_products_spread_over_streams_needs_one_workspace() -> None:
    """Per layer: weights are merged (0, 3, 6), which waits for nothing, then multiplied (1, 4, 7), then activated."""
    graph = graph_with_edges(9, [(0, 1), (1, 2), (2, 4), (3, 4), (4, 5), (5, 7), (6, 7), (7, 8)])
    products = {1, 4, 7}
    schedule = with_waits(graph, (0, 0, 0, 1, 1, 1, 2, 2, 2), (0, 3, 6, 1, 2, 4, 5, 7, 8))
    assert used_by(schedule, products) == {0, 1, 2}
    found = gathered(schedule, calls(products))
    assert used_by(found, products) == {0}
    assert found.stream == (0, 0, 0, 1, 0, 0, 2, 0, 0)
    assert found.waits[4] == (3,)
    assert found.waits[7] == (6,)


def test_two_chains_of_products_need_two_workspaces() -> None:
    """Two towers of three products, each product behind weights merged for it alone, dealt out to four streams."""
    towers = [tuple(range(start, start + 6)) for start in (0, 6)]  # of each the weights of three products, the products
    pairs = [(t[layer], t[3 + layer]) for t in towers for layer in range(3)]
    pairs += [(t[layer], t[layer + 1]) for t in towers for layer in (3, 4)]
    graph = graph_with_edges(13, [*pairs, (5, 12), (11, 12)])
    products = {k for t in towers for k in t[3:]}
    schedule = with_waits(graph, (0, 1, 2, 0, 1, 2, 1, 2, 3, 1, 2, 3, 3), (0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11, 12))
    assert used_by(schedule, products) == {0, 1, 2, 3}
    found = gathered(schedule, calls(products))
    assert used_by(found, products) == {0, 1}
    assert len({found.stream[k] for k in towers[0][3:]}) == len({found.stream[k] for k in towers[1][3:]}) == 1
    assert found.streams <= 4


def test_a_stream_more_is_not_taken_to_gather_on_fewer() -> None:
    """Products 1 and 3 could follow each other if 2 had a third stream: none is allowed that was not there."""
    graph = graph_with_edges(4, [(1, 3)])
    schedule = with_waits(graph, (0, 1, 1, 0), range(4))
    assert gathered(schedule, calls({1, 3})) == schedule


def test_the_stream_with_most_products_is_the_first() -> None:
    graph = graph_with_edges(5, [(1, 2), (2, 3), (0, 4), (3, 4)])
    schedule = with_waits(graph, (0, 1, 1, 1, 0), (0, 1, 2, 3, 4))
    found = gathered(schedule, calls({0, 1, 2, 3}))
    assert found.stream[1:4] == (0, 0, 0)
    assert found.stream[0] == 1


def test_what_inductor_generated_no_code_for_may_be_a_librarys() -> None:
    graph = graph_with_edges(3, [])
    kinds = ("triton", "extern", "cpp")
    kernels = tuple(replace(k, kind=kind) for k, kind in zip(graph.kernels, kinds, strict=True))
    assert library_kernels(replace(graph, kernels=kernels)) == {1}


def test_products_side_by_side_stay_so() -> None:
    graph = graph_with_edges(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
    schedule = with_waits(graph, (0, 0, 1, 0), (0, 1, 2, 3))
    assert gathered(schedule, calls({1, 2, 3})) == schedule


def test_the_stream_with_the_products_is_the_first() -> None:
    """Candidates that are captured on the same streams share the libraries' memory only if it is on the same ones."""
    graph = graph_with_edges(3, [(0, 2), (1, 2)])
    schedule = with_waits(graph, (0, 1, 1), (0, 1, 2))
    found = gathered(schedule, calls({2}))
    assert (found.stream, found.waits[2]) == ((1, 0, 0), (0,))


def test_streams_of_libraries_are_left_to_the_way_to_the_next_of_them() -> None:
    """Behind product 0 come a long side way (1, 2) and the way to product 4: the latter goes on where 0 ran."""
    graph = graph_with_edges(6, [(0, 1), (1, 2), (0, 3), (3, 4), (2, 5), (4, 5)])
    schedule = with_waits(graph, (0, 0, 0, 1, 1, 1), (0, 1, 2, 3, 4, 5))
    found = gathered(schedule, calls({0, 4}))
    assert found.stream == (0, 1, 1, 0, 0, 0)
    assert found.wait_count == schedule.wait_count


@given(problems(), st.integers(1, 8))
def test_on_fewer_streams_nothing_is_forgotten(
    problem: tuple[KernelGraph, Schedule, Mapping[int, int]], most: int
) -> None:
    """Library kernels on at most so many streams: what happened before something still does, others are not moved."""
    graph, schedule, libraries = problem
    found = on_fewer_streams(schedule, libraries, libraries, lambda one: len(used_by(one, libraries)) <= most)
    before = len(used_by(schedule, libraries))
    assert (found is None) == (before < 2), "on one stream it fits"
    if found is None:
        return
    verify(graph, found)
    assert (found.order, found.policy) == (schedule.order, schedule.policy)
    assert len(used_by(found, libraries)) == max(1, min(most, before - 1))
    old, new = happens_before(schedule), happens_before(found)
    pairs = [(one, other) for one in range(len(graph)) for other in range(len(graph))]
    assert all(new.ordered(*pair) for pair in pairs if old.ordered(*pair))
    others = [kernel for kernel in range(len(graph)) if kernel not in libraries]
    together = [(one, other) for one in others for other in others if schedule.stream[one] == schedule.stream[other]]
    assert all(found.stream[one] == found.stream[other] for one, other in together)


def test_those_that_ask_for_most_come_first() -> None:
    """So that schedules captured on the same streams share what is reserved there."""
    schedule = with_waits(graph_with_edges(3, []), (0, 1, 2), range(3))
    for numbered in (gathered, renumbered):
        assert numbered(schedule, {0: 1, 1: 5, 2: 3}).stream == (2, 0, 1)


@given(problems())
def test_numbers_alone_change_nothing_but_numbers(problem: tuple[KernelGraph, Schedule, Mapping[int, int]]) -> None:
    graph, schedule, libraries = problem
    found = renumbered(schedule, libraries)
    verify(graph, found)
    assert len({*zip(schedule.stream, found.stream, strict=True)}) == len({*schedule.stream}) == len({*found.stream})
    before, after = happens_before(schedule), happens_before(found)
    pairs = [(one, other) for one in range(len(graph)) for other in range(len(graph))]
    assert [before.ordered(*pair) for pair in pairs] == [after.ordered(*pair) for pair in pairs]
