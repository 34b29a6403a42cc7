"""Kernel graphs, profiles and schedules, drawn by hypothesis or made from a few numbers. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hypothesis import strategies as st

from opara_backend.kernel_graph import Buffer, Edge, Kernel, KernelGraph
from opara_backend.lowering.dependencies import edges
from opara_backend.profiling.profile import KernelProfile, Profile
from opara_backend.scheduling.policies import BUILT_IN_ORDERS, BUILT_IN_POLICIES, build
from opara_backend.scheduling.schedule import Schedule

POLICIES = tuple(sorted(BUILT_IN_POLICIES))
# Those that ask for no edges beside the graph's own, so that no wait of theirs can be spared.
FREE_POLICIES = tuple(name for name in POLICIES if name not in ("wavefront", "just_in_time"))
ORDERS = tuple(sorted(BUILT_IN_ORDERS))
WIDTHS = st.sampled_from([1, 2, 3, 8])
_ACTIONS = ("planned", "allocated", "two", "whole", "part", "in place", "overwrite", "random")


def kernel(index: int, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> Kernel:
    """Kernel number `index`, of which nothing matters but what it touches."""
    return Kernel(f"k{index}", "triton", f"f{index}", tuple(reads), tuple(writes))


def graph_of(*touched: tuple[str, str], outputs: Sequence[str] = (), buffers: Sequence[Buffer] = ()) -> KernelGraph:
    """A graph from ("names read", "names written") per kernel; a name that is read first is an input."""
    kernels = [kernel(index, reads.split(), writes.split()) for index, (reads, writes) in enumerate(touched)]
    found = {b.name: b for b in buffers}
    for k in kernels:
        for name in k.reads:
            found.setdefault(name, Buffer(name, "input", 4096))
        for name in k.writes:
            found.setdefault(name, Buffer(name, "intermediate", 4096, planned=True))
    return KernelGraph(tuple(kernels), tuple(found.values()), edges(kernels), tuple(outputs))


def graph_with_edges(count: int, pairs: Iterable[tuple[int, int]]) -> KernelGraph:
    """`count` kernels, each writing one buffer of its own and reading those of its predecessors."""
    before: list[list[int]] = [[] for _ in range(count)]
    for first, second in sorted(pairs):
        before[second].append(first)
    kernels = [kernel(index, [f"b{i}" for i in before[index]], [f"b{index}"]) for index in range(count)]
    buffers = [Buffer(f"b{index}", "intermediate", 4096, planned=True) for index in range(count)]
    found = [Edge(first, second, "RAW", f"b{first}") for second in range(count) for first in before[second]]
    return KernelGraph(tuple(kernels), tuple(buffers), tuple(found))


def layered_graph(count: int, width: int, seed: int = 0) -> KernelGraph:
    """Layers of `width` kernels; each kernel reads the results of one to three kernels of the layer before."""
    rng = random.Random(seed)
    pairs = []
    for index in range(width, count):
        layer = index // width * width - width
        pairs += [(layer + place, index) for place in {rng.randrange(width) for _ in range(rng.randint(1, 3))}]
    return graph_with_edges(count, pairs)


def random_profile(count: int, seed: int = 0) -> Profile:
    """Durations and demands between 0 and 1, half of the kernels memory-bound."""
    rng = random.Random(seed)
    return Profile(tuple(KernelProfile(rng.random(), rng.random(), rng.random() < 0.5) for _ in range(count)))


def profile_of(*kernels: tuple[str, float]) -> Profile:
    """A profile from ("memory" or "compute", demand) per kernel; every kernel takes a second."""
    return Profile(tuple(KernelProfile(1.0, demand, kind == "memory") for kind, demand in kernels))


@st.composite
def kernel_graphs(draw: st.DrawFn, min_kernels: int = 0, max_kernels: int = 12) -> KernelGraph:
    """Graphs with everything that makes dependencies hard.

    Several kernels naming one storage (what aliases come down to), writes in place, buffers overwritten, parts of a
    whole, inputs that are written, a random generator's state, buffers nobody planned, empty ones, several outputs.
    """
    sizes = st.sampled_from([0, 1, 300, 512, 513, 2000])
    buffers = [
        Buffer("in0", "input", 1024),
        Buffer("in1", "input", 600),
        Buffer("const0", "constant", 64),
        Buffer("rng", "state", 0),
    ]
    parts: dict[str, list[str]] = {}
    readable = ["in0", "in1", "const0"]
    unwritten: list[str] = []
    kernels = []

    def new(name: str, planned: bool = True) -> str:
        buffers.append(Buffer(name, "intermediate", draw(sizes) if planned else None, planned=planned))
        return name

    for index in range(draw(st.integers(min_kernels, max_kernels))):
        reads = draw(st.lists(st.sampled_from(readable), max_size=3, unique=True))
        action = draw(st.sampled_from(_ACTIONS))
        if action == "part" and not unwritten:
            action = "whole"
        if action in ("in place", "overwrite"):
            writes = [draw(st.sampled_from([n for n in readable if n != "const0"]))]
            if action == "in place":
                reads += writes
        elif action == "part":
            writes = [unwritten.pop(draw(st.integers(0, len(unwritten) - 1)))]
        elif action == "whole":
            whole = new(f"whole{index}")
            parts[whole] = [f"{whole}.{place}" for place in range(draw(st.integers(2, 3)))]
            buffers += [Buffer(name, "intermediate", 0, part_of=whole) for name in parts[whole]]
            writes, unwritten = parts[whole][:1], [*unwritten, *parts[whole][1:]]
        else:
            writes = [new(f"buf{index}", planned=action != "allocated")]
            if action == "two":
                writes.append(new(f"also{index}"))
        readable += [name for name in writes if name not in readable]
        readable += [w for w, own in parts.items() if w not in readable and not set(own).intersection(unwritten)]
        if action == "random":
            reads, writes = [*reads, "rng"], [*writes, "rng"]
        kernels.append(kernel(index, _with_parts(reads, parts), _with_parts(writes, parts)))
    outputs = draw(st.lists(st.sampled_from([*readable, None]), max_size=2))
    return KernelGraph(tuple(kernels), tuple(buffers), edges(kernels), tuple(outputs))


def _with_parts(names: Iterable[str], parts: dict[str, list[str]]) -> list[str]:
    return list(dict.fromkeys(part for name in names for part in (name, *parts.get(name, ()))))


@st.composite
def profiles(draw: st.DrawFn, count: int) -> Profile:
    """Profiles of `count` kernels, with ties."""
    kernels = st.builds(
        KernelProfile, st.sampled_from([0.0, 1.0, 1.5, 4.0]), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()
    )
    return Profile(tuple(draw(st.lists(kernels, min_size=count, max_size=count))))


@st.composite
def profiled_graphs(draw: st.DrawFn, min_kernels: int = 0, max_kernels: int = 12) -> tuple[KernelGraph, Profile]:
    """A graph and a profile of its kernels."""
    graph = draw(kernel_graphs(min_kernels, max_kernels))
    return graph, draw(profiles(len(graph)))


@st.composite
def schedules(draw: st.DrawFn, graph: KernelGraph, policies: Sequence[str] = POLICIES) -> Schedule:
    """What `build` makes of a graph, by one of `policies`."""
    return build(
        graph,
        draw(profiles(len(graph))),
        policy=draw(st.sampled_from(policies)),
        launch_order=draw(st.sampled_from(ORDERS)),
        streams=draw(WIDTHS),
    )


@st.composite
def scheduled_graphs(
    draw: st.DrawFn, min_kernels: int = 0, max_kernels: int = 12, policies: Sequence[str] = POLICIES
) -> tuple[KernelGraph, Schedule]:
    """A graph and what `build` makes of it."""
    graph = draw(kernel_graphs(min_kernels, max_kernels))
    return graph, draw(schedules(graph, policies))


@st.composite
def graphs_written_in_place(draw: st.DrawFn) -> tuple[KernelGraph, Schedule]:
    """A graph with few different sizes, whose kernels may write some outputs over some inputs, and a schedule of it."""
    graph = draw(kernel_graphs(2, 12))
    sizes = st.sampled_from([512, 512, 1024])
    buffers = [replace(b, nbytes=draw(sizes)) if b.planned else b for b in graph.buffers]
    wholes = {b.part_of for b in buffers}
    alike = {b.name: b.nbytes for b in buffers if b.planned and b.part_of is None and b.name not in wholes}
    kernels = []
    for k in graph.kernels:
        pairs = [
            (read, write)
            for read in k.reads
            for write in k.writes
            if read not in k.writes and write not in k.reads and alike.get(read, 0) == alike.get(write, 1)
        ]
        draw(st.randoms(use_true_random=False)).shuffle(pairs)
        chosen: list[tuple[str, str]] = []
        for read, write in pairs:
            if not any(read in pair or write in pair for pair in chosen):
                chosen.append((read, write))
        kernels.append(replace(k, inplace=tuple(chosen)))
    graph = replace(graph, kernels=tuple(kernels), buffers=tuple(buffers))
    return graph, draw(schedules(graph))
