"""How far memory plans are from the smallest there can be, on random graphs and on recorded ones."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given

from bench.recorded import Recording, load_all
from opara_backend.kernel_graph import Buffer, KernelGraph
from opara_backend.memory import ALIGNMENT, plan_memory
from opara_backend.scheduling.policies import build, in_a_row
from opara_backend.scheduling.schedule import Schedule, with_waits
from tests import reference
from tests.arena_bound import arena_bound
from tests.strategies import graph_of, scheduled_graphs

RECORDED = {recording.name: recording for recording in load_all()}


@given(scheduled_graphs())
def test_no_plan_is_smaller(found: tuple[KernelGraph, Schedule]) -> None:
    graph, schedule = found
    assert arena_bound(graph, schedule) <= plan_memory(graph, schedule).arena_bytes


@given(scheduled_graphs())
def test_it_is_no_less_than_what_two_buffers_need(found: tuple[KernelGraph, Schedule]) -> None:
    graph, schedule = found
    before = reference.happens_before(schedule)
    kept = {whole for name in graph.outputs if name is not None for whole in reference.wholes(graph, name)}
    users = {b.name: reference.users(graph, b.name) for b in graph.buffers if b.planned and b.nbytes}
    users = {name: found for name, found in users.items() if found}
    for one, other in itertools.combinations(users, 2):
        first = one not in kept and reference.ends_before(before, users[one], users[other])
        last = other not in kept and reference.ends_before(before, users[other], users[one])
        if not first and not last:
            sizes = [int(graph.buffer(name).nbytes or 0) for name in (one, other)]
            assert arena_bound(graph, schedule) >= sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def test_a_chain_needs_two_buffers_at_a_time_and_branches_all_of_theirs() -> None:
    sizes = [Buffer(name, "intermediate", 1024, planned=True) for name in "abcd"]
    chain = graph_of(("", "a"), ("a", "b"), ("b", "c"), ("c", "d"), buffers=sizes)
    assert arena_bound(chain, with_waits(chain, [0] * 4, range(4))) == 2048
    branches = graph_of(("", "a"), ("", "b"), ("", "c"), ("a b c", "d"), buffers=sizes)
    assert arena_bound(branches, with_waits(branches, range(4), range(4))) == 4096


@pytest.mark.parametrize("policy", ["sequential", "opara", "nimble", "list_k", "wavefront"])
@pytest.mark.parametrize("name", RECORDED)
def test_plans_of_recorded_graphs_are_close_to_the_bound(name: str, policy: str) -> None:
    recording = RECORDED[name]
    schedule = build(recording.graph, recording.profile, policy=policy, launch_order="opara", streams=8)
    bound = arena_bound(recording.graph, schedule)
    assert bound <= plan_memory(recording.graph, schedule).arena_bytes <= 1.1 * bound


def peak_of_inductor(recording: Recording) -> int:
    """Bytes held at most by stock Inductor, which frees a buffer behind its last kernel, in program order.

    The caching allocator gives multiples of 512 bytes, too. In-place reuse, which Inductor has besides, is left out.
    """
    graph = recording.graph
    users = {b.name: reference.users(graph, b.name) for b in graph.buffers if b.planned and b.nbytes}
    kept = {whole for name in graph.outputs if name is not None for whole in reference.wholes(graph, name)}
    sizes = {name: -(-int(graph.buffer(name).nbytes or 0) // ALIGNMENT) * ALIGNMENT for name in users}
    held = peak = 0
    for kernel in range(len(graph)):
        held += sum(sizes[name] for name, found in users.items() if found and min(found) == kernel)
        peak = max(peak, held)
        held -= sum(sizes[name] for name, found in users.items() if found and max(found) == kernel and name not in kept)
    return peak


@pytest.mark.parametrize("name", RECORDED)
def test_one_stream_in_program_order_needs_no_more_than_inductor(name: str) -> None:
    recording = RECORDED[name]
    schedule = in_a_row(recording.graph)
    arena = plan_memory(recording.graph, schedule).arena_bytes
    assert arena <= peak_of_inductor(recording)
