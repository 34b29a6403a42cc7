"""How a search goes about its captures: what is kept, what is given back and when. Captures and times are made up."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opara_backend.execution import candidates, race, state, winners
from opara_backend.execution.affordable import MORE_ARENA, TRIES, Heats, affordable
from opara_backend.execution.candidates import LATER, MOST_LOOKED_AT, capture_best
from opara_backend.execution.cuda_graph import CapturedGraph
from opara_backend.execution.host import Arena, Plan, SharedMemory
from opara_backend.execution.program import Program
from opara_backend.execution.race import HELD_TWICE, LEAST, Memory
from opara_backend.execution.runtime import Runtime
from opara_backend.execution.state import state_kept
from opara_backend.kernel_graph import KernelGraph
from opara_backend.options import Options
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.schedule import Schedule
from opara_backend.scheduling.search import NOISE
from opara_backend.scheduling.workspaces import Workspaces
from tests.gpu_profiles import GPU, kernel
from tests.strategies import graph_with_edges

LANES, APART = "the lane's pool", "a pool of its own"
FORK = replace(graph_with_edges(6, [(0, k) for k in range(1, 5)] + [(k, 5) for k in range(1, 5)]), device="cuda:0")
PROFILE = Profile(tuple(kernel(1e-6 * (3 + k), 20) for k in range(6)), GPU)


class Piece:
    """Memory of an arena, or what is cut from it."""

    def __init__(self, nbytes: int) -> None:
        self.bytes: int | None = nbytes

    @property
    def nbytes(self) -> int:
        return self.bytes or 0


class Captured(CapturedGraph):
    """One of nothing, which knows its plan."""

    def __init__(self, plan: Plan, memory: Memory, arena: Any) -> None:
        graph: Any = SimpleNamespace(reset=lambda: None)
        super().__init__(graph, (), arena, torch.device("cuda"), memory.pool)
        self.plan, self.candidate = plan, memory.candidates


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    """`value` for what the search and its races call `name`."""
    for module in (candidates, race):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)


@dataclass
class World:
    """What the search is given in place of a GPU. seconds: of a schedule; alive: graphs there at the last capture;
    workspaces: how many graphs had been made each time that libraries' workspaces were given up; profiled_arena: bytes
    that the profiled one had when some were raced last; budget: seconds that this might take.
    """

    seconds: Callable[[Schedule], float] = lambda schedule: 1.0 / schedule.streams
    arena: int = 1
    made: list[Captured] = field(default_factory=list)
    raced: list[Captured] = field(default_factory=list)
    alive: list[Captured] = field(default_factory=list)
    workspaces: list[int] = field(default_factory=list)
    profiled: int = 0
    profiled_arena: int = 0
    budget: float = 0.0

    def capture_plan(self, program: Program, plan: Plan, arguments: Any, memory: Memory, probe: Any = None) -> Captured:
        self.alive = [made for made in self.made if made.outputs is not None]
        shared = isinstance(memory.supply, SharedMemory)
        arena = Arena(plan.memory, "cpu", memory.supply) if shared else Piece(self.arena)
        self.made.append(Captured(plan, memory, arena))
        return self.made[-1]

    def profile_on_cuda(self, graph: KernelGraph, capture: Callable[[Any], Captured]) -> tuple[Profile, Captured]:
        self.profiled += 1
        capture(lambda kernel: None).reset()
        return PROFILE, capture(None)

    def give_up_workspaces(self, streams: Sequence[Any]) -> None:
        self.workspaces.append(len(self.made))

    def seconds_per_replay(self, graphs: Sequence[Captured], budget: float) -> list[float]:
        assert all(graph.outputs is not None for graph in graphs)
        self.raced, self.budget = list(graphs), budget
        self.profiled_arena = self.made[1].arena.nbytes
        return [self.seconds(graph.plan.schedule) for graph in graphs]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    world = World()
    for name in ("capture_plan", "profile_on_cuda", "seconds_per_replay", "give_up_workspaces"):
        replaced(monkeypatch, name, getattr(world, name))
    replaced(monkeypatch, "give_back_unused", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: APART)
    monkeypatch.setattr(candidates, "private_streams", lambda device, count: [])
    monkeypatch.setattr(winners, "place", lambda program, graph, shape, options: tmp_path / f"{shape}.json")
    return world


STATIC_BYTES = 1 << 30
ARGUMENTS: Any = SimpleNamespace(static_bytes=lambda: STATIC_BYTES)


def search(
    shape: object = (), memory: Memory | None = None, **options: Any
) -> tuple[Runtime, Plan, Captured, list[tuple[Schedule, float]]]:
    runtime = Runtime(Program(lambda *_: iter(()), FORK.to_json()), FORK, Options(**options))
    memory = memory or Memory(LANES, Piece)  # type: ignore[arg-type]
    plan, captured, tried = capture_best(runtime, FORK, ARGUMENTS, memory, shape)
    return runtime, plan, captured, tried  # type: ignore[return-value]


def test_the_winner_is_captured_for_good_when_all_others_are_gone(world: World) -> None:
    _, plan, captured, tried = search()
    assert len(tried) > 2
    assert [made.pool for made in world.made] == [APART] * (len(world.made) - 1) + [LANES]
    assert captured is world.made[-1]
    assert captured.plan is plan
    assert [made.candidate for made in world.made] == [True] * (len(world.made) - 1) + [False]
    assert world.alive == []
    assert [made for made in world.made if made.outputs is not None] == [captured]


def test_what_libraries_need_for_candidates_goes_with_them(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the winner would work in memory of a pool that has ended."""
    search()
    assert world.workspaces == [len(world.made) - 1]

    def failing(*args: Any) -> list[float]:
        raise RuntimeError("a replay failed")

    replaced(monkeypatch, "seconds_per_replay", failing)
    with pytest.raises(RuntimeError, match="a replay failed"):
        search("another shape")
    assert world.workspaces[1:] == [len(world.made)]


def test_as_fast_as_any_of_those_tried(world: World) -> None:
    _, plan, _, tried = search()
    (taken,) = {seconds for schedule, seconds in tried if schedule == plan.schedule}
    assert taken <= NOISE * min(seconds for _, seconds in tried)
    assert 0 < world.budget < Options().search_seconds
    assert plan.schedule.streams > 1
    world.seconds = lambda schedule: float(schedule.streams)
    _, plan, _, _ = search("another shape")
    assert plan.schedule.streams == 1


def test_the_chain_that_was_profiled_is_the_candidate_on_one_stream(world: World) -> None:
    search()
    profiled = world.made[1]
    assert world.raced[0] is profiled
    assert profiled.plan.schedule.streams == 1
    assert len(world.made) == 2 + (len(world.raced) - 1) + 1


@pytest.mark.parametrize(("held", "again"), [(HELD_TWICE, False), (HELD_TWICE + 1, True), (1 << 30, False)])
def test_but_not_if_that_would_hold_a_large_arena_twice(
    world: World, monkeypatch: pytest.MonkeyPatch, held: int, again: bool
) -> None:
    """Arenas of all candidates take 100 MB; 1 GB, as another shape left it, holds them all."""
    plan = Runtime.plan

    def large(*args: Any, **kwargs: Any) -> Plan:
        made = plan(*args, **kwargs)
        return replace(made, memory=replace(made.memory, arena_bytes=100_000_000))

    monkeypatch.setattr(Runtime, "plan", large)
    world.arena = held
    search()
    profiled = world.made[1]
    assert (profiled not in world.raced) == again
    assert profiled.outputs is None
    assert world.profiled_arena == (0 if again else held), "while they are raced"
    assert profiled.arena.nbytes == 0


@pytest.mark.parametrize(
    ("one", "static", "most"),
    [
        (1, 0, 1 + MORE_ARENA),
        (10, 9 * MORE_ARENA, 10 + MORE_ARENA),
        (10 * MORE_ARENA, 20 * MORE_ARENA, 13 * MORE_ARENA),
        (10 * MORE_ARENA, 0, 25 * MORE_ARENA // 2),
    ],
)
def test_a_schedule_that_takes_much_more_memory_than_one_stream_is_not_tried(
    world: World, monkeypatch: pytest.MonkeyPatch, one: int, static: int, most: int
) -> None:
    """Bytes of arena: on one stream `one`, on three `most`, on more one above. Weights take `static`."""
    plan = Runtime.plan

    def sized(self: Runtime, graph: KernelGraph, profile: Profile, schedule: Schedule, *, captured: bool) -> Plan:
        made = plan(self, graph, profile, schedule, captured=captured)
        needed = one if schedule.streams == 1 else most if schedule.streams < 4 else most + 1
        return replace(made, memory=replace(made.memory, arena_bytes=needed))

    monkeypatch.setattr(Runtime, "plan", sized)
    monkeypatch.setattr(ARGUMENTS, "static_bytes", lambda: static)
    _, _, _, tried = search(extra_memory=1 << 13)
    assert {schedule.streams for schedule, _ in tried} == {1, 2, 3}
    monkeypatch.setattr(ARGUMENTS, "static_bytes", lambda: static + 20 * MORE_ARENA)
    _, _, _, tried = search("another shape", extra_memory=1 << 13)
    assert {schedule.streams for schedule, _ in tried} > {1, 2, 3}


def test_arena_and_workspaces_take_no_more_than_is_allowed_together(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stream takes 10 MiB of arena, and 32 MiB for its products: on one 42 MiB, of which a tenth is 4.2 MiB."""
    plan = Runtime.plan
    products = [replace(k, kind="extern", call="extern_kernels.mm") for k in FORK.kernels]
    monkeypatch.setattr(sys.modules[__name__], "FORK", replace(FORK, kernels=tuple(products)))

    def sized(self: Runtime, graph: KernelGraph, profile: Profile, schedule: Schedule, *, captured: bool) -> Plan:
        made = plan(self, graph, profile, schedule, captured=captured)
        return replace(made, memory=replace(made.memory, arena_bytes=schedule.streams * (10 << 20)))

    monkeypatch.setattr(Runtime, "plan", sized)
    monkeypatch.setattr(ARGUMENTS, "static_bytes", lambda: 0)
    memory = Memory(LANES, Piece, Workspaces(product=32 << 20))  # type: ignore[arg-type]
    for extra, most in ((0, 1), (37, 1), (38, 2), (79, 2), (80, 3)):
        _, _, _, tried = search(f"{extra}", memory, extra_memory=extra)
        assert max((schedule.streams for schedule, _ in tried), default=1) == most


def test_a_small_arena_may_grow_to_what_the_allocator_reserves_anyway(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Runtime.plan

    def sized(self: Runtime, graph: KernelGraph, profile: Profile, schedule: Schedule, *, captured: bool) -> Plan:
        made = plan(self, graph, profile, schedule, captured=captured)
        return replace(made, memory=replace(made.memory, arena_bytes=schedule.streams * 1000))

    monkeypatch.setattr(Runtime, "plan", sized)
    _, _, _, tried = search(extra_memory=0)
    assert max(schedule.streams for schedule, _ in tried) > 1


@pytest.mark.parametrize(("stage", "made"), [("plan", LEAST), ("capture", 5), ("race", 8)])
def test_when_time_is_up_no_more_schedules_are_tried(
    world: World, monkeypatch: pytest.MonkeyPatch, stage: str, made: int
) -> None:
    """The clock stands still until `stage`, and has run down by then: so many schedules have been tried."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    plan = Runtime.plan

    def planned(*args: Any, **kwargs: Any) -> Plan:
        now[0] += 10.0 if stage == "plan" else 0.0
        return plan(*args, **kwargs)

    def captured(*args: Any, **kwargs: Any) -> Captured:
        now[0] += 10.0 if stage == "capture" and len(world.made) == 5 else 0.0  # the fifth that is raced
        return world.capture_plan(*args, **kwargs)

    monkeypatch.setattr(Runtime, "plan", planned)
    replaced(monkeypatch, "capture_plan", captured)
    _, _, _, tried = search(search_seconds=1.0)
    assert len(tried) == len(world.raced) == made


@pytest.fixture(params=["row alone", "two a heat"])
def in_heats(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The first heat one stream alone, or with another; two plans in each that follows."""
    first = 1 if request.param == "row alone" else 2

    def split(*args: Any, **kwargs: Any) -> Heats:
        (plans,) = affordable(*args, **kwargs)
        return [plans[:first], *(plans[place : place + 2] for place in range(first, len(plans), 2))]

    monkeypatch.setattr(candidates, "affordable", split)


two_a_heat = pytest.mark.parametrize("in_heats", ["two a heat"], indirect=True)


@pytest.mark.usefixtures("in_heats")
def test_a_heat_begins_when_the_one_before_has_given_its_memory_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = (f"pool {number}" for number in itertools.count())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    plan, supply = Runtime.plan, SharedMemory(torch.device("cpu"))

    def sized(*args: Any, **kwargs: Any) -> Plan:
        made = plan(*args, **kwargs)
        return replace(made, memory=replace(made.memory, arena_bytes=1000 * made.schedule.streams))

    monkeypatch.setattr(Runtime, "plan", sized)

    def arenas() -> list[int]:
        return [piece.numel() for ref in supply._pieces if (piece := ref()) is not None]

    given_back: list[tuple[int, list[int]]] = []
    replaced(monkeypatch, "give_back_unused", lambda: given_back.append((len(world.made), arenas())))
    heats: list[list[Captured]] = []
    timed = itertools.count(1)
    world.seconds = lambda schedule: 1.0 / next(timed)  # each is faster than those before

    def raced(graphs: Sequence[Captured], budget: float) -> list[float]:
        assert [made for made in world.made if made.outputs is not None] == [*graphs], "nothing else is there"
        assert given_back[-1:] == ([(len(world.made) - len(graphs), [])] if heats else []), "the others' memory neither"
        assert len(world.workspaces) == len(heats), "nor what libraries worked in"
        assert max(arenas()) == max(graph.plan.memory.arena_bytes for graph in graphs)
        heats.append([*graphs])
        return world.seconds_per_replay(graphs, budget)

    replaced(monkeypatch, "seconds_per_replay", raced)
    _, best, captured, tried = search(memory=Memory(LANES, supply))
    assert len(heats) > 2
    assert [{graph.pool for graph in heat} for heat in heats] == [{f"pool {n}"} for n in range(len(heats))]
    assert [schedule for schedule, _ in tried] == [graph.plan.schedule for heat in heats for graph in heat]
    assert [seconds for _, seconds in tried] == [1.0 / n for n in range(1, len(tried) + 1)]
    assert captured.pool == LANES
    assert best.schedule == tried[-1][0]


@two_a_heat
@pytest.mark.usefixtures("in_heats")
@pytest.mark.parametrize(("capture", "made"), [(1, LEAST), (2, LEAST), (3, 4), (4, 5), (5, 6)])
def test_no_heat_begins_when_time_is_up(world: World, monkeypatch: pytest.MonkeyPatch, capture: int, made: int) -> None:
    """It is while this one is captured, the row being the first; of each heat one is tried that has begun."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    counted = itertools.count(-1)  # with the one that is profiled

    def captured(*args: Any, **kwargs: Any) -> Captured:
        now[0] += 10.0 if next(counted) == capture else 0.0
        return world.capture_plan(*args, **kwargs)

    replaced(monkeypatch, "capture_plan", captured)
    _, _, _, tried = search(search_seconds=1.0)
    assert len(tried) == made


@pytest.mark.usefixtures("in_heats")
def test_time_is_left_for_a_capture_in_whatever_heat(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures of a second each, that of the winner too, but for the row, which is there: six in five and a half."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    profiled: list[Captured] = []

    def captured(*args: Any, **kwargs: Any) -> Captured:
        made = world.capture_plan(*args, **kwargs)
        now[0] += 1.0 if len(profiled) >= 2 else 0.0
        profiled.append(made)
        return made

    replaced(monkeypatch, "capture_plan", captured)
    _, _, _, tried = search(search_seconds=5.5)
    assert len(tried) == 5 + 1
    assert now[0] == 6.0


@pytest.mark.usefixtures("in_heats")
@pytest.mark.parametrize(("times", "wins"), [(LATER, False), (1.001, False), (0.999, True)])
def test_what_is_timed_later_wins_if_that_cannot_be_the_clocks(world: World, times: float, wins: bool) -> None:
    timed = itertools.count()
    world.seconds = lambda schedule: 1.0 if next(timed) < 2 else times / LATER / NOISE
    _, plan, _, tried = search()
    assert (plan.schedule in [schedule for schedule, _ in tried[2:]]) == wins


@two_a_heat
@pytest.mark.usefixtures("in_heats")
def test_want_of_memory_in_a_later_heat_leaves_what_was_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first there is nothing to fall back on: whoever asked decides."""

    def failing(number: int) -> Callable[..., Captured]:
        def captured(*args: Any, **kwargs: Any) -> Captured:
            if len(world.made) == number:
                world.made.append(world.made[-1])
                raise torch.OutOfMemoryError("no more")
            return world.capture_plan(*args, **kwargs)

        return captured

    replaced(monkeypatch, "capture_plan", failing(4))  # the second heat's second
    _, plan, captured, tried = search()
    assert len(tried) == 2
    assert plan.schedule in [schedule for schedule, _ in tried]
    assert [made for made in world.made if made.outputs is not None] == [captured]
    world.made.clear()
    replaced(monkeypatch, "capture_plan", failing(2))
    with pytest.raises(torch.OutOfMemoryError):
        search("another shape")
    assert all(made.outputs is None for made in world.made), "while somebody still holds the error"


def test_what_a_tenth_more_is_does_not_forget_the_arena(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of 1 GiB is more than the 96 MiB that products on three more streams work in."""
    plan = Runtime.plan
    products = [replace(k, kind="extern", call="extern_kernels.mm") for k in FORK.kernels]
    monkeypatch.setattr(sys.modules[__name__], "FORK", replace(FORK, kernels=tuple(products)))

    def sized(*args: Any, **kwargs: Any) -> Plan:
        made = plan(*args, **kwargs)
        return replace(made, memory=replace(made.memory, arena_bytes=1 << 30))

    monkeypatch.setattr(Runtime, "plan", sized)
    monkeypatch.setattr(ARGUMENTS, "static_bytes", lambda: 0)
    memory = Memory(LANES, Piece, Workspaces(product=32 << 20))  # type: ignore[arg-type]
    _, _, _, tried = search("many", memory, extra_memory=0)
    assert max(schedule.streams for schedule, _ in tried) == 4


def test_no_end_of_schedules_is_planned_when_time_is_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them may be tried, so none counts as found."""
    plan, made = Runtime.plan, []

    def sized(*args: Any, **kwargs: Any) -> Plan:
        made.append(plan(*args, **kwargs))
        streams = made[-1].schedule.streams
        return replace(made[-1], memory=replace(made[-1].memory, arena_bytes=1 << 40 if streams > 1 else 1))

    monkeypatch.setattr(Runtime, "plan", sized)
    search(search_seconds=0.0, candidates=256)
    assert len(made) <= 2 + (MOST_LOOKED_AT - 1) * (1 + TRIES), "one before profiling, one stream"


def test_kernels_of_libraries_are_gathered_on_one_stream() -> None:
    """A chain of products, each behind a kernel of its own that waits for nothing: whatever streams a policy gives."""
    graph = replace(graph_with_edges(8, [(0, 4), (1, 5), (4, 5), (2, 6), (5, 6), (3, 7), (6, 7)]), device="cuda:0")
    products = {4, 5, 6, 7}
    kernels = (replace(k, kind="extern") if i in products else k for i, k in enumerate(graph.kernels))
    graph = replace(graph, kernels=tuple(kernels))
    profile = Profile(tuple(kernel(5e-6, 20) for _ in graph.kernels), GPU)
    for options in (Options(), Options(policy="nimble"), Options(policy="opara", streams=128)):
        runtime = Runtime(Program(lambda *_: iter(()), graph.to_json()), graph, options)
        found = runtime.schedules(graph, profile)
        assert max(schedule.streams for schedule in found) > 1
        assert {schedule.stream[k] for schedule in found for k in products} == {0}
        assert len({schedule.launches for schedule in found}) == len(found)


@pytest.mark.parametrize("on_device", [0, 1 << 20])
def test_state_is_put_back_wherever_it_was_kept(monkeypatch: pytest.MonkeyPatch, on_device: int) -> None:
    monkeypatch.setattr(state, "STATE_ON_DEVICE", on_device)
    tensors = [torch.arange(6.0).view(2, 3).t(), torch.arange(4)]
    kept_on: list[str] = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: (kept_on.append(str(a[0])), to(self, *a, **k))[1])
    before = [tensor.tolist() for tensor in tensors]
    with state_kept(tensors, FORK):
        for tensor in tensors:
            tensor.add_(1)
        assert [tensor.tolist() for tensor in tensors] != before
    assert [tensor.tolist() for tensor in tensors] == before
    assert kept_on == ([] if on_device else ["cpu", "cpu"])


def test_one_policy_by_name_is_not_raced(world: World) -> None:
    _, plan, captured, tried = search(policy="nimble")
    assert plan.schedule.policy.startswith("nimble/")
    assert (tried, world.raced) == ([], [])
    assert captured is world.made[-1]
    assert captured.pool == LANES
    assert world.profiled == 1


def test_what_is_remembered_is_captured_and_nothing_else(world: World) -> None:
    _, first, _, tried = search()
    world.made.clear()
    world.raced.clear()
    runtime, plan, captured, again = search()
    assert world.made == [captured]
    assert world.profiled == 1
    assert (plan.schedule, plan.profile, again) == (first.schedule, first.profile, tried)
    assert (plan.reserved, plan.pool) == (first.reserved, first.pool)
    assert plan.pool is not None, "what libraries take is told all the same"
    assert runtime.record.remembered == {()}
    assert runtime.record.stages.search == runtime.record.stages.profile == 0.0


@pytest.mark.parametrize("waits", [(), (len(FORK),), (-1,)], ids=["none", "for nobody", "for less"])
def test_what_is_remembered_and_wrong_is_searched_anew(
    world: World, monkeypatch: pytest.MonkeyPatch, waits: tuple[int, ...]
) -> None:
    _, first, _, _ = search()
    broken = replace(first.schedule, waits=(waits,) * len(FORK))
    monkeypatch.setattr(winners, "find", lambda path, graph: winners.Winner(first.profile, broken))
    runtime, plan, _, _ = search()
    assert world.profiled == 2
    assert plan.schedule == first.schedule
    assert not runtime.record.remembered
