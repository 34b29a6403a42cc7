"""What libraries take beside the arena, and which schedules are not tried for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend.kernel_graph import Buffer, KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.gathering import gathered
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.schedule import Schedule, happens_before, verify, with_waits
from opara_backend.scheduling.search import candidates
from opara_backend.scheduling.workspaces import (
    NONE,
    Pools,
    Workspaces,
    allocations,
    allowed,
    fitting,
    is_product,
    launched,
)
from tests.gpu_profiles import GPU, Scheduled, gpu_schedules, kernel
from tests.strategies import WIDTHS, graph_with_edges

MIB = 1 << 20


def calling(graph: KernelGraph, call: str, kernels: set[int]) -> KernelGraph:
    """`graph`, in which some kernels are calls of a library."""
    changed = (replace(k, kind="extern", call=call) if i in kernels else k for i, k in enumerate(graph.kernels))
    return replace(graph, kernels=tuple(changed))


BRANCHES = graph_with_edges(6, [(0, k) for k in range(1, 5)] + [(k, 5) for k in range(1, 5)])
FORK = calling(BRANCHES, "extern_kernels.mm", {1, 2, 3, 4})
FORK_PROFILE = Profile(tuple(kernel(1e-6 * (3 + k), 20) for k in range(6)), GPU)
CUBLAS = Workspaces(product=32 * MIB)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("extern_kernels.mm", True),
        ("extern_kernels.bias_addmm", True),
        ("extern_kernels.convolution", False),
        ("torch.ops.aten._scaled_mm.default", True),
        ("torch.ops.aten._scaled_dot_product_cudnn_attention.default", False),
        ("torch.ops.mine.mm.default", False),
        ("convolution_out", False),
        ("triton_mm", False),
    ],
)
def test_what_calls_cublas(call: str, expected: bool) -> None:
    assert is_product(calling(BRANCHES, call, {1}).kernels[1]) == expected


@pytest.mark.parametrize(
    ("stream", "needed", "expected"),
    [
        ((0,) * 6, CUBLAS, 32),
        ((0, 0, 1, 2, 1, 0), CUBLAS, 96),
        ((0, 1, 1, 1, 1, 0), CUBLAS, 32),  # the others are no products
        ((0,) * 6, Workspaces({1: 3 * MIB, 2: 12 * MIB}), 12),  # one after the other
        ((0, 0, 1, 0, 0, 0), Workspaces({1: 3 * MIB, 2: 12 * MIB}), 10 + 12),
        ((0, 0, 1, 1, 0, 0), Workspaces({1: 3 * MIB, 2: 12 * MIB, 3: 11 * MIB}, 32 * MIB), 36 + 44),
        ((0, 1, 2, 3, 4, 5), NONE, 0),
    ],
)
def test_each_stream_has_its_own(stream: tuple[int, ...], needed: Workspaces, expected: int) -> None:
    schedule = with_waits(FORK, stream, range(6))
    assert sum(allocations(FORK, needed).reserved(schedule).values()) == expected * MIB


@pytest.mark.parametrize(("extra", "streams"), [(0, 1), (28, 1), (29, 2), (60, 2), (61, 3), (93, 4)])
def test_as_many_streams_of_products_as_there_is_memory_for(extra: int, streams: int) -> None:
    """extra: MiB, beside a tenth of what one stream takes. Products with more streams than that take turns on these."""
    fit = fitting(allocations(FORK, CUBLAS), len(FORK), 0, extra * MIB)
    for width in range(1, 6):
        schedule = build(FORK, FORK_PROFILE, policy="nimble", launch_order="program", streams=width)
        together = gathered(schedule, allocations(FORK, CUBLAS).pieces)
        used, found = len({together.stream[k] for k in (1, 2, 3, 4)}), fit(schedule)
        assert found is not None
        assert (found is schedule) == (used <= streams)
        assert len({gathered(found, allocations(FORK, CUBLAS).pieces).stream[k] for k in (1, 2, 3, 4)}) == min(
            used, streams
        )
        assert found.policy == ("nimble/program" if used <= streams else "nimble/program, less memory")


@pytest.mark.parametrize(("static", "streams"), [(0, 1), (287, 1), (288, 2), (608, 3)])
def test_a_large_model_may_take_a_tenth_of_itself_more(static: int, streams: int) -> None:
    """static: MiB of weights. 32 MiB for each stream with products."""
    schedule = build(FORK, FORK_PROFILE, policy="nimble", launch_order="program", streams=5)
    found = fitting(allocations(FORK, CUBLAS), len(FORK), static * MIB, 0)(schedule)
    assert found is not None
    assert sum(allocations(FORK, CUBLAS).reserved(found).values()) == 32 * MIB * streams


@pytest.mark.parametrize(("replaced", "products", "expected"), [(True, False, 32), (True, True, 0), (False, False, 0)])
def test_what_stock_inductors_products_would_keep_may_go_to_others(
    replaced: bool, products: bool, expected: int
) -> None:
    """Convolutions that need 12 MiB each, side by side where a kernel of ours stands for a product."""
    graph = FORK if products else calling(BRANCHES, "extern_kernels.convolution", {1, 2, 3, 4})
    needed = Workspaces(dict.fromkeys((1, 2, 3, 4), 12 * MIB), 32 * MIB, replaced)
    kernels = allocations(graph, needed)
    assert kernels.spared == expected * MIB
    schedule = build(graph, FORK_PROFILE, policy="nimble", launch_order="program", streams=5)
    found = fitting(allocations(graph, needed), len(graph), 0, 0)(schedule)
    assert found is not None
    assert len({found.stream[k] for k in (1, 2, 3, 4)}) == (3 if expected else 1)


def test_a_chain_of_products_fits_whatever_streams_a_policy_spreads_it_over() -> None:
    chain = calling(graph_with_edges(4, [(0, 1), (1, 2), (2, 3)]), "extern_kernels.addmm", {0, 1, 2, 3})
    schedule = Schedule((0, 1, 0, 1), (0, 1, 2, 3), ((), (0,), (1,), (2,)))
    assert sum(allocations(chain, CUBLAS).reserved(schedule).values()) == 64 * MIB
    assert fitting(allocations(chain, CUBLAS), len(chain), 0, 0)(schedule) is schedule
    assert launched(allocations(chain, CUBLAS))(schedule).streams == 1


def test_results_that_kernels_make_count_until_the_last_who_reads_them() -> None:
    """Three convolutions in a chain make 8 MiB each: two are there at a time, or three."""
    graph = calling(graph_with_edges(4, [(0, 1), (1, 2), (2, 3)]), "extern_kernels.convolution", {0, 1, 2})
    made = tuple(replace(b, planned=False, nbytes=8 * MIB) if b.name != "b3" else b for b in graph.buffers)
    graph = replace(graph, buffers=made)
    row = with_waits(graph, (0,) * 4, range(4))
    kernels = allocations(graph, NONE)
    assert kernels.reserved(row) == {0: 16 * MIB}
    assert kernels.reserved(row, ((), (), ("b0",), ("b1",))) == {0: 16 * MIB}
    assert kernels.reserved(row, ((), (), (), ("b0", "b1"))) == {0: 24 * MIB}
    kept = allocations(replace(graph, outputs=("b0", "b1", "b2")), NONE)
    assert kept.reserved(row) == {0: 24 * MIB}
    assert kernels.reserved(with_waits(graph, (0, 1, 0, 0), range(4))) == {0: 10 * MIB, 1: 10 * MIB}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Scheduled, Workspaces]:
    """A scheduled graph in which some kernels call libraries, and what these need."""
    graph, profile, schedule = draw(gpu_schedules())
    calls = draw(st.sets(st.integers(0, 30)))
    made = draw(st.sets(st.sampled_from([b.name for b in graph.buffers]))) if graph.buffers else set()
    buffers = tuple(
        replace(b, planned=False, nbytes=3 * MIB) if b.kind == "intermediate" and b.name in made else b
        for b in graph.buffers
    )
    graph = replace(calling(graph, "extern_kernels.mm", calls), buffers=buffers)
    transient = {k: (k + 1) * MIB for k in calls if k < len(graph) and k % 3 == 0}
    return (graph, profile, schedule), Workspaces(transient, draw(st.sampled_from([0, 32])) * MIB)


@given(problems(), st.sampled_from([0, 100, 1000]), st.sampled_from([0, 20, 32, 100]))
def test_what_is_made_to_fit_fits_and_keeps_every_order(
    problem: tuple[Scheduled, Workspaces], static: int, extra: int
) -> None:
    (graph, _, schedule), needed = problem
    found = fitting(allocations(graph, needed), len(graph), static * MIB, extra * MIB)(schedule)
    if found is None:
        return
    verify(graph, found)
    assert found.order == schedule.order
    before, after = happens_before(schedule), happens_before(found)
    pairs = [(one, other) for one in range(len(graph)) for other in range(len(graph))]
    assert all(after.ordered(*pair) for pair in pairs if before.ordered(*pair))
    kernels = allocations(graph, needed)
    row = with_waits(graph, (0,) * len(graph), range(len(graph)))
    least = sum(kernels.reserved(row).values())
    taken = sum(kernels.reserved(launched(allocations(graph, needed))(found)).values())
    assert taken <= allowed(static * MIB, least, kernels.spared, extra * MIB)


@given(problems(), WIDTHS, st.integers(1, 9))
def test_no_schedule_that_takes_more_than_it_may_is_tried(
    problem: tuple[Scheduled, Workspaces], streams: int, count: int
) -> None:
    (graph, profile, _), needed = problem
    fit = fitting(allocations(graph, needed), len(graph), 0, 0)
    found = candidates(graph, profile, count=count, streams=streams, fit=fit)
    kernels = allocations(graph, needed)
    least = sum(kernels.reserved(found[0]).values())
    for schedule in found[1:]:
        verify(graph, schedule)
        taken = sum(kernels.reserved(launched(allocations(graph, needed))(schedule)).values())
        assert taken <= allowed(0, least, 0, 0)


@given(problems())
def test_without_extra_memory_one_stream_is_never_refused(problem: tuple[Scheduled, Workspaces]) -> None:
    (graph, _, _), needed = problem
    row = with_waits(graph, (0,) * len(graph), range(len(graph)))
    assert fitting(allocations(graph, needed), len(graph), 0, 0)(row) is row


@given(problems())
def test_what_is_reserved_in_one_piece_is_enough_and_less(problem: tuple[Scheduled, Workspaces]) -> None:
    (graph, _, schedule), needed = problem
    kernels = allocations(graph, needed)
    alone = {s: pool.reserved for s, pool in kernels.captured(schedule, None, Pools()).of.items()}
    reserved, segments = kernels.packed(schedule)
    assert kernels.reserved(schedule) == reserved
    together = kernels.captured(schedule, None, Pools(), segments)
    assert {stream: pool.reserved for stream, pool in together.of.items()} == reserved
    assert reserved.keys() == alone.keys()
    for stream, nbytes in reserved.items():
        assert nbytes < alone[stream] if stream in segments else nbytes == alone[stream]


def test_library_kernels_stay_apart_where_gathering_would_take_more() -> None:
    """On three streams 24 MiB are asked for on one and 12 on another; on two, which are enough, 24 on both."""
    graph = calling(graph_with_edges(4, [(0, 1), (0, 2), (0, 3), (1, 2)]), "convolution", {0, 1, 2, 3})
    needed = Workspaces({0: 24 * MIB, 1: 12 * MIB, 3: 24 * MIB})
    schedule = with_waits(graph, (1, 0, 2, 1), range(4))
    kernels = allocations(graph, needed)
    together = gathered(schedule, allocations(graph, needed).pieces)
    assert (together.streams, sum(kernels.reserved(together).values())) == (2, 48 * MIB)
    found = launched(allocations(graph, needed))(schedule)
    assert (found.streams, kernels.reserved(found)) == (3, {0: 24 * MIB, 1: 12 * MIB})
    assert happens_before(found).ordered(1, 2), "which it waited for before"


@pytest.mark.parametrize("known", [5 * MIB, None, "4*s0"])
def test_a_result_of_unknown_size_is_what_its_kernel_kept(known: int | str | None) -> None:
    """Kernel 1, the first product, kept cuBLAS's workspace as well."""
    graph = calling(graph_with_edges(3, [(0, 1), (1, 2)]), "extern_kernels.mm", {1, 2})
    buffers = tuple(replace(b, planned=False, nbytes=known) if b.name != "b0" else b for b in graph.buffers)
    graph = replace(graph, buffers=buffers)
    needed = Workspaces(product=32 * MIB, kept={1: 37 * MIB, 2: 34 * MIB})
    expected = {1: 5 * MIB, 2: 5 * MIB} if known == 5 * MIB else {1: 5 * MIB, 2: 34 * MIB}
    assert {k: sum(n for _, n in made) for k, made in allocations(graph, needed).results.items()} == expected


def test_a_part_of_a_result_keeps_it() -> None:
    """Kernel 0 makes 8 MiB, of which a part is read last by kernel 3: until then nobody else may have them."""
    graph = calling(graph_with_edges(4, [(0, 3), (1, 2), (2, 3)]), "extern_kernels.convolution", {0, 1, 2})
    part = Buffer("part", "intermediate", 4 * MIB, part_of="b0")
    made = tuple(replace(b, planned=False, nbytes=8 * MIB) if b.name != "b3" else b for b in graph.buffers)
    kernels = tuple(replace(k, reads=("part", "b2")) if k.name == "k3" else k for k in graph.kernels)
    whole = replace(graph, buffers=made)
    parted = replace(graph, buffers=(*made, part), kernels=kernels)
    row = with_waits(graph, (0,) * 4, range(4))
    assert allocations(parted, NONE).reserved(row) == allocations(whole, NONE).reserved(row) == {0: 24 * MIB}
    assert allocations(parted, NONE).users["b0"] == {0, 3}
