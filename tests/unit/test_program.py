"""ProgramWriter: what it writes runs, and its graph says what touches what."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from opara_backend.kernel_graph import KernelGraph
from opara_backend.lowering.statements import parse
from tests.programs import Source, fresh


def edges(graph: KernelGraph) -> list[tuple[int, int]]:
    return sorted({(edge.src, edge.dst) for edge in graph.edges})


def touched(graph: KernelGraph, kernel: int) -> tuple[set[str], set[str]]:
    return set(graph.kernels[kernel].reads), set(graph.kernels[kernel].writes)


def memory(*values: int) -> memoryview:
    return memoryview(bytearray(values))


def add(first: memoryview, second: memoryview, out: memoryview) -> None:
    for place, (a, b) in enumerate(zip(first, second, strict=True)):
        out[place] = a + b


def doubled(values: memoryview) -> memoryview:
    return memory(*(2 * value for value in values))


def test_a_program_runs_and_is_described() -> None:
    source = Source(inputs=("arg0", "arg1"))
    source.alloc("buf0", 2)
    source.call("add(arg0, arg1, buf0)", "arg0 arg1", "buf0")
    source.call("buf1 = doubled(buf0)", "buf0")
    run = source.run("buf1", "arg0", args=[memory(1, 2), memory(10, 20)], add=add, doubled=doubled)
    assert run.advance()
    assert len(run.tasks) == 2
    outputs = run.finish()
    assert [list(output) for output in outputs] == [[22, 44], [1, 2]]
    graph = source.graph("buf1", "arg0")
    assert str(graph).splitlines() == [
        "kernel_graph(arg0, arg1) on cpu:",
        "  %0 buf0 = add(arg0, arg1)",
        "  %1 buf1 = doubled(buf0)  after %0",
        "  return buf1, arg0",
    ]
    assert [b.name for b in graph.buffers if b.kind == "input"] == ["arg0", "arg1"]
    assert [b.name for b in graph.buffers if b.planned] == ["buf0"], "what a kernel allocates cannot be planned"


def test_nothing_runs_before_it_is_asked_to() -> None:
    source = Source()
    source.call("note(arg0)", "arg0", "arg0")
    notes: list[Any] = []
    run = source.run(args=["x"], note=notes.append)
    run.advance()
    assert notes == []
    run.tasks[0]()
    assert notes == ["x"]


def test_views_are_resolved_to_the_storage_they_live_in() -> None:
    source = Source()
    source.alloc("buf0", 4)
    source.view("buf1 = buf0[1:3]")
    source.view("buf2 = buf1")
    source.call("mix(buf2, (arg0,), 1)", "arg0", "buf2")
    source.view("arg0_view = arg0[:1]")
    source.call("mix(buf0, (arg0_view,), 2)", "arg0_view", "buf0")
    source.call("mix(arg0_view, (), 3)", "", "arg0_view")
    graph = source.graph("buf1", "arg0_view")
    assert [touched(graph, k) for k in range(3)] == [({"arg0"}, {"buf0"}), ({"arg0"}, {"buf0"}), (set(), {"arg0"})]
    assert edges(graph) == [(0, 1), (0, 2), (1, 2)]
    assert graph.outputs == ("buf0", "arg0")
    given = memory(1, 2, 3)
    part, view = source.run("buf1", "arg0_view", args=[given]).finish()
    assert (len(part), len(view)) == (2, 1)
    assert given[0] == view[0] != 1
    assert list(given[1:]) == [2, 3]


def test_a_view_of_what_a_kernel_returns_is_bound_when_that_kernel_has_run() -> None:
    source = Source()
    source.call("buf0 = make((arg0,), 1)", "arg0")
    source.view("buf1 = buf0[2:4]")
    source.view("buf2 = buf1[:1]")
    source.call("mix(buf1, (arg0,), 2)", "arg0", "buf1")
    source.call("buf3 = make((buf2,), 3)", "buf2")
    graph = source.graph("buf0", "buf3")
    assert edges(graph) == [(0, 1), (1, 2)]
    assert touched(graph, 2) == ({"buf0"}, {"buf3"})
    run = source.run("buf0", "buf1", args=[memory(5)])
    run.advance()
    assert len(run.tasks) == 3, "views launch nothing"
    whole, part = run.finish()
    assert list(whole[2:4]) == list(part)


def test_parts_of_a_tuple_come_from_one_kernel() -> None:
    source = Source()
    source.call("buf0 = pair(arg0)", "arg0")
    source.view("buf1 = buf0[0]")
    source.view("buf2 = buf0[1]")
    source.alloc("buf3")
    source.call("mix(buf3, (buf1, buf2), 0)", "buf1 buf2", "buf3")
    assert edges(source.graph("buf2", "buf3")) == [(0, 1)]
    run = source.run("buf2", "buf3", args=[memory(1, 2)], pair=lambda values: (values[:1], values[1:]))
    assert list(run.finish()[0]) == [2]


def test_a_view_over_two_kernels_results_waits_for_both() -> None:
    source = Source()
    source.call("buf0 = make((arg0,), 1)", "arg0")
    source.call("buf1 = make((arg0,), 2)", "arg0")
    source.view("buf2 = pick[buf0[0]:, buf1]")
    source.call("buf3 = make((arg0,), 3)", "arg0")
    graph = source.graph("buf2")
    assert edges(graph) == [(0, 1)], "the later of the two binds the view, so it runs second"

    class Pick:
        def __getitem__(self, key: tuple[slice, memoryview]) -> tuple[int, int]:
            return key[0].start, key[1][0]

    run = source.run("buf0", "buf1", "buf2", args=[memory(7)], pick=Pick())
    first, second, picked = run.finish()
    assert picked == (first[0], second[0])


def test_parts_are_independent_of_each_other_but_not_of_the_whole() -> None:
    source = Source()
    source.alloc("buf2", 4)
    source.part("buf0 = buf2[:2]", "buf2")
    source.part("buf1 = buf2[2:]", "buf2")
    source.call("mix(buf0, (arg0,), 1)", "arg0", "buf0")
    source.call("mix(buf1, (arg0,), 2)", "arg0", "buf1")
    source.call("buf3 = make((buf2,), 3)", "buf2")
    source.call("mix(buf2, (arg0,), 4)", "arg0", "buf2")
    source.call("buf4 = make((buf1,), 5)", "buf1")
    graph = source.graph("buf3", "buf4")
    assert edges(graph) == [(0, 2), (1, 2), (2, 3), (3, 4)]
    assert {b.name: b.part_of for b in graph.buffers} == {
        "arg0": None, "buf2": None, "buf0": "buf2", "buf1": "buf2", "buf3": None, "buf4": None
    }  # fmt: skip
    assert {b.name for b in graph.buffers if b.planned} == {"buf2"}
    run = source.run("buf0", "buf1", "buf2", args=[memory(9)])
    left, right, whole = run.finish()
    assert [*left, *right] == list(whole)


def test_a_whole_that_only_its_parts_are_touched_of_is_still_a_buffer() -> None:
    source = Source()
    source.alloc("buf1", 4)
    source.part("buf0 = buf1[:2]", "buf1")
    source.call("mix(buf0, (arg0,), 1)", "arg0", "buf0")
    graph = source.graph("buf0")
    assert graph.buffer("buf0").part_of == "buf1"
    assert graph.buffer("buf1").planned
    assert graph.outputs == ("buf0",)


def test_a_part_of_a_part_belongs_to_both() -> None:
    source = Source()
    source.alloc("buf2", 4)
    source.part("buf1 = buf2[:2]", "buf2")
    source.part("buf0 = buf1[:1]", "buf1")
    source.part("buf3 = buf2[2:]", "buf2")
    source.call("mix(buf0, (arg0,), 1)", "arg0", "buf0")
    source.call("mix(buf3, (arg0,), 2)", "arg0", "buf3")
    source.call("buf4 = make((buf1,), 3)", "buf1")
    source.call("buf5 = make((buf2,), 4)", "buf2")
    graph = source.graph("buf4", "buf5")
    assert edges(graph) == [(0, 2), (0, 3), (1, 3)]


def test_a_slice_of_what_a_kernel_allocates_is_a_view() -> None:
    """There is nothing to slice before the kernel has run, so its slices cannot be written independently."""
    source = Source()
    source.call("buf1 = make((arg0,), 1)", "arg0")
    source.part("buf0 = buf1[:2]", "buf1")
    source.call("mix(buf0, (arg0,), 2)", "arg0", "buf0")
    graph = source.graph("buf1")
    assert edges(graph) == [(0, 1)]
    assert touched(graph, 1) == ({"arg0"}, {"buf1"})
    source.run("buf1", args=[memory(1)]).finish()


def test_a_slice_of_a_view_may_overlap_other_slices() -> None:
    source = Source()
    source.alloc("buf3", 4)
    source.part("buf0 = buf3[:2]", "buf3")
    source.view("buf2 = buf3[1:]")
    source.part("buf1 = buf2[:1]", "buf2")
    source.call("mix(buf0, (arg0,), 1)", "arg0", "buf0")
    source.call("mix(buf1, (arg0,), 2)", "arg0", "buf1")
    assert edges(source.graph("buf3")) == [(0, 1)]


def test_an_input_keeps_its_name_whatever_it_is_united_with() -> None:
    """A result that may live in the input or in a buffer: from here on the two are one storage."""
    source = Source()
    source.alloc("buf0")
    source.call("mix(buf0, (arg0,), 1)", "arg0", "buf0")
    source.call("buf1 = either(arg0, buf0)", "arg0 buf0", aliases="arg0 buf0")
    source.call("mix(arg0, (), 2)", "", "arg0")
    source.call("buf2 = make((buf0,), 3)", "buf0")
    graph = source.graph("buf1")
    assert [b.name for b in graph.buffers] == ["arg0", "buf2"]
    assert graph.outputs == ("arg0",)
    assert edges(graph) == [(0, 1), (1, 2), (2, 3)]


def test_results_that_alias_an_argument_live_in_it() -> None:
    source = Source()
    source.call("buf0 = touch(arg0)", "arg0", "", aliases="arg0")
    source.call("buf1 = make((arg0,), 2)", "arg0")
    graph = source.graph("buf0")
    assert graph.outputs == ("arg0",)
    assert edges(graph) == [(0, 1)]


def test_what_a_cpp_kernel_is_first_to_write_it_does_not_read() -> None:
    """A pointer that is not const may be read, but there is nothing to read in memory nobody has written."""
    source = Source()
    source.alloc("buf0")
    for salt in (1, 2):
        source.call(f"mix(buf0, (arg0,), {salt})", "arg0 buf0", "buf0", kind="cpp")
    source.call("mix(arg0, (buf0,), 3)", "arg0 buf0", "arg0", kind="cpp")
    graph = source.graph("buf0")
    assert touched(graph, 0) == ({"arg0"}, {"buf0"})
    assert touched(graph, 1) == ({"arg0", "buf0"}, {"buf0"})
    assert touched(graph, 2) == ({"arg0", "buf0"}, {"arg0"})


def test_random_numbers_are_drawn_in_program_order() -> None:
    source = Source()
    for name in ("buf0", "buf1", "buf2"):
        source.alloc(name)
    source.call("draw(buf0)", "", "buf0", random=True)
    source.call("mix(buf1, (), 1)", "", "buf1")
    source.call("draw(buf2)", "", "buf2", random=True)
    graph = source.graph("buf0", "buf2")
    assert edges(graph) == [(0, 2)]
    assert graph.buffer("rng").kind == "state"


def test_without_random_numbers_there_is_no_generator_in_the_graph() -> None:
    source = Source()
    source.call("mix(arg0, (), 1)", "", "arg0")
    assert [b.name for b in source.graph().buffers] == ["arg0"]


def test_custom_operators_keep_their_order() -> None:
    source = Source()
    for salt in (1, 2, 3):
        source.alloc(f"buf{salt}")
        source.call(f"mix(buf{salt}, (arg0,), {salt})", "arg0", f"buf{salt}", custom=salt != 2)
    graph = source.graph("buf1", "buf3")
    assert edges(graph) == [(0, 2)]
    assert graph.buffer("hidden").kind == "state"
    assert [graph.kernels[k].host for k in range(3)] == [False] * 3, "it can be captured"


def test_what_a_custom_operator_was_given_can_be_let_go() -> None:
    """The program holds it no longer, nor its views and parts; nobody else does, unless the operator has kept it."""
    source = Source()
    for name in ("buf0", "buf1"):
        source.alloc(name)
    source.part("buf2 = buf1[:2]", "buf1")
    source.view("buf3 = buf0[1:3]")
    source.view("buf4 = buf1[2:]")
    source.call("mix(buf2, (arg0,), 1)", "arg0", "buf2")
    source.call("mix(buf0, (arg0,), 2)", "arg0", "buf0")
    source.call("buf5 = keep(buf3, buf4)", "buf3 buf4", custom=True)
    kept: list[Any] = []
    given: dict[str, weakref.ref[memoryview]] = {}

    def alloc(name: str, nbytes: int) -> memoryview:
        made = fresh(name, nbytes)
        given[name] = weakref.ref(made.obj)
        return made

    class Bytes(bytearray):
        """That can be looked at weakly."""

    def fresh(name: str, nbytes: int) -> memoryview:
        return memoryview(Bytes(nbytes))

    def keep(first: memoryview, second: memoryview) -> memoryview:
        kept.append(second)
        return memory(1)

    source.graph("buf5")
    run = source.run("buf5", args=[memory(1, 2)], alloc=alloc, keep=keep)
    run.advance()
    for task in run.tasks:
        task()
    assert all(ref() is not None for ref in given.values())
    for name in ("buf0", "buf1"):
        run.release[name]()
    gc.collect()
    assert given["buf0"]() is None
    assert given["buf1"]() is not None
    kept.clear()
    gc.collect()
    assert given["buf1"]() is None


def test_what_kernels_have_made_before_the_host_looked_is_checked_there() -> None:
    source = Source()
    source.call("buf0 = make((arg0,), 1)", "arg0")
    source.view("buf1 = buf0[2:4]")
    source.host("size = buf0[0].item()")
    source.view("buf2 = buf0[:1]")
    for name in ("buf0", "buf1", "buf2"):
        source.check(f"check({name})")
    source.check("check(arg0)")
    source.graph("buf0")
    checked: list[int] = []

    class Number(int):
        def item(self) -> int:
            return int(self)

    class Memory:
        def __init__(self, length: int) -> None:
            self.length = length

        def __getitem__(self, key: Any) -> Any:
            return Memory(len(range(*key.indices(self.length)))) if isinstance(key, slice) else Number(self.length)

    run = source.run("buf0", args=["x"], make=lambda *_: Memory(8), check=lambda found: checked.append(found.length))
    run.finish()
    assert checked == [8, 2, 1], "inputs have been looked at by whoever calls"


@pytest.mark.parametrize(
    ("device", "kernel_device", "buffer_device", "host"),
    [
        ("cuda:0", "cuda:0", "cuda:0", False),
        ("cuda:0", "cpu", "cuda:0", True),
        ("cuda:0", "cuda:0", "cpu", True),
        ("cpu", "cpu", "cpu", False),
    ],
)
def test_kernels_that_touch_the_cpu_in_a_graph_of_a_gpu_need_the_host(
    device: str, kernel_device: str, buffer_device: str, host: bool
) -> None:
    source = Source(device=device)
    source.alloc("buf0", device=buffer_device)
    source.call("mix(buf0, (arg0,), 1)", "arg0", "buf0", device=kernel_device)
    assert source.graph("buf0").kernels[0].host == host


def test_what_is_known_of_a_kernel_is_kept() -> None:
    source = Source()
    source.call("mix(arg0, (), 1)", "", "arg0", dtype="bfloat16", flops=7, source="net.py:3 in forward")
    kernel = source.graph().kernels[0]
    assert (kernel.name, kernel.call, kernel.dtype, kernel.flops, kernel.source) == (
        "k0", "mix", "bfloat16", 7, "net.py:3 in forward"
    )  # fmt: skip


# --- the host in between ---------------------------------------------------------------------------------------------


def test_a_value_read_back_splits_the_program() -> None:
    source = Source()
    source.call("mix(arg0, (), 1)", "", "arg0")
    source.host("u0 = int(arg0[0])")
    source.plain("s0 = 2*u0")
    source.alloc("buf1", "s0")
    source.call("mix(buf1, (arg0,), 2)", "arg0", "buf1")
    graph = source.graph("buf1")
    assert graph.segments == (0, 1)
    run = source.run("buf1", "u0", args=[memory(0)])
    assert run.advance()
    assert len(run.tasks) == 1, "what comes after the host's look is not there yet"
    run.tasks.pop()()
    assert run.advance()
    run.tasks.pop()()
    assert not run.advance()
    assert run.outputs is not None
    assert len(run.outputs[0]) == 2 * run.outputs[1] > 0


def test_several_looks_without_a_kernel_between_them_split_once() -> None:
    source = Source()
    source.call("mix(arg0, (), 1)", "", "arg0")
    source.host("u0 = int(arg0[0])")
    source.host("u1 = int(arg0[1])")
    source.call("mix(arg0, (), 2)", "", "arg0")
    assert source.graph("u0").segments == (0, 1)


def test_a_look_before_the_first_kernel_counts() -> None:
    """A size that an input's value decides: what was planned for one value does not fit another."""
    source = Source()
    source.host("u0 = int(arg0[0])")
    source.call("mix(arg0, (), u0)", "", "arg0")
    graph = source.graph("arg0")
    assert len(graph.segments) > 1
    assert source.run("u0", args=[memory(3)]).finish() == (3,)


def test_a_look_behind_the_last_kernel_counts() -> None:
    """An output that is read back: whoever stops after the last kernel never gets there."""
    source = Source()
    source.call("mix(arg0, (), 1)", "", "arg0")
    source.host("u0 = int(arg0[0])")
    graph = source.graph("arg0", "u0")
    assert graph.segments == (0, 1)
    given = memory(0)
    assert source.run("u0", args=[given]).finish() == (given[0],)
    assert given[0]


def test_a_view_after_the_hosts_look_may_use_what_the_host_learnt() -> None:
    source = Source()
    source.call("buf0 = make((arg0,), 1)", "arg0")
    source.call("mix(arg0, (), 2)", "", "arg0")
    source.host("u0 = int(arg0[0]) % 4")
    source.view("buf1 = buf0[u0:]")
    source.call("buf2 = make((buf1,), 3)", "buf1")
    graph = source.graph("buf1", "buf2")
    assert (0, 2) in edges(graph)
    viewed, length = source.run("buf1", "u0", args=[memory(1)]).finish()
    assert len(viewed) == 8 - length


def test_control_flow_keeps_its_shape() -> None:
    source = Source()
    source.call("mix(arg0, (), 1)", "", "arg0")
    source.host("if arg0[0] > 300:", 1)
    source.host("buf0 = 'large'")
    source.host("", -1)
    source.host("else:", 1)
    source.host("buf0 = 'small'", -1)
    source.call("buf1 = upper(buf0)", "buf0")
    graph = source.graph("buf1")
    assert graph.segments == (0, 1)
    assert source.run("buf1", args=[memory(0)], upper=str.upper).finish() == ("SMALL",)


def test_inside_control_flow_everything_is_the_hosts() -> None:
    source = Source()
    assert not source.writer.depends_on_host(parse("buf1 = f(arg0)"))
    source.host("if arg0[0]:", 1)
    assert source.writer.depends_on_host(parse("buf1 = f(arg0)"))
    source.host("pass", -1)
    assert not source.writer.depends_on_host(parse("buf1 = f(arg0)"))


# --- ends of lives ---------------------------------------------------------------------------------------------------


class Thing:
    """Something whose end can be seen."""


def test_release_drops_every_reference_the_program_holds() -> None:
    source = Source()
    source.call("buf0 = thing(arg0)", "arg0")
    source.view("buf1 = buf0")
    source.call("use(buf1)", "buf1", "arg0")
    source.call("buf2 = thing(arg0)", "arg0")
    graph = source.graph("buf2")
    made: list[weakref.ref[Thing]] = []

    def thing(_: Any) -> Thing:
        new = Thing()
        made.append(weakref.ref(new))
        return new

    run = source.run("buf2", args=[fresh("", 1)], thing=thing, use=lambda _: None)
    run.advance()
    assert set(run.release) == {b.name for b in graph.buffers if b.kind == "intermediate"}
    for task in run.tasks:
        task()
    assert made[0]() is not None
    run.release["buf0"]()
    gc.collect()
    assert made[0]() is None
    assert made[1]() is not None
    assert not run.advance()
    assert run.outputs == (made[1](),)


def test_views_of_one_storage_are_dropped_together_and_others_are_not() -> None:
    source = Source()
    source.call("buf0 = make((arg0,), 1)", "arg0")
    source.view("buf1 = buf0[1:]")
    source.call("buf2 = make((arg0,), 2)", "arg0")
    run = source.run("buf0", "buf1", "buf2", args=[memory(1)])
    run.advance()
    for task in run.tasks:
        task()
    run.release["buf0"]()
    run.advance()
    assert run.outputs is not None
    assert run.outputs[:2] == (None, None)
    assert run.outputs[2] is not None
