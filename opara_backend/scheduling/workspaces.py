"""What kernels allocate themselves beside a schedule's arena, and how much of it is too much.

Takes: a schedule, and what each kernel's library needs. Gives: bytes that torch's allocator will reserve; which
schedules take few enough. Must not change: anything. Imports no torch.

A convolution allocates its workspace when it is launched and frees it when it is queued, and some make their results
themselves. The allocator hands freed memory on to what is launched later on the same stream, and to no other stream,
and reserves 2 or 20 MiB for less (`scheduling.segments`), which is more than it needs unless it is first asked for what
a stream takes at most. cuBLAS keeps one workspace for each stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from opara_backend.kernel_graph import Kernel, KernelGraph
from opara_backend.scheduling.gathering import gathered, library_kernels, on_fewer_streams, renumbered
from opara_backend.scheduling.schedule import Schedule
from opara_backend.scheduling.segments import SMALL, Block, Pool, one_segment, segment_bytes

OPERATORS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_int_mm", "_scaled_mm", "linear", "matmul")
MORE = 0.1  # of what model and one stream take together is never too much


@dataclass(frozen=True)
class Workspaces:
    """What libraries need, in bytes. transient: by kernel, while it runs; product: per stream with products.

    replaced: True if kernels of this backend's stand for products, so that stock Inductor's would need `product`, too.
    kept: by kernel, what it allocated beside and did not free: results, and the first time a stream's `product`.
    """

    transient: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    product: int = 0
    replaced: bool = False
    kept: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))


NONE = Workspaces()
LESS = "less memory"  # said of the policy of a schedule that was made to fit


@dataclass(frozen=True)
class Pools:
    """A memory pool of the allocator's: what each stream has of it, and streams on which cuBLAS keeps a workspace."""

    of: dict[int, Pool] = field(default_factory=dict)
    products: set[int] = field(default_factory=set)

    @property
    def reserved(self) -> int:
        """Bytes, all streams together."""
        return sum(pool.reserved for pool in self.of.values())

    def copy(self) -> Pools:
        """Another that is the same from here on."""
        return Pools({stream: pool.copy() for stream, pool in self.of.items()}, {*self.products})


_Step = tuple[str | int | None, int]
"""What is allocated, a result by its name or the workspace of a kernel, and its bytes; 0 where it is freed."""


@dataclass(frozen=True)
class Allocations:
    """What the kernels of a graph allocate, in bytes.

    transient: by kernel, while it runs. products: kernels that keep `product` on their stream. spared: what those of
    stock Inductor would keep beside. results: by kernel, buffers that it makes itself. users: of each of those that
    end, the kernels that touch it. libraries: kernels that may call one.
    """

    transient: Mapping[int, int]
    products: frozenset[int]
    product: int
    spared: int
    results: Mapping[int, tuple[tuple[str, int], ...]]
    users: Mapping[str, frozenset[int]]
    libraries: frozenset[int]

    @functools.cached_property
    def _touched(self) -> Mapping[int, Sequence[str]]:
        """By kernel, those of `users` that it touches."""
        found: dict[int, list[str]] = {}
        for name, kernels in self.users.items():
            for kernel in kernels:
                found.setdefault(kernel, []).append(name)
        return found

    @functools.cached_property
    def _allocate(self) -> frozenset[int]:
        """Kernels that allocate anything."""
        return frozenset((*self.results, *(k for k, nbytes in self.transient.items() if nbytes), *self.products))

    @functools.cached_property
    def pieces(self) -> Mapping[int, int]:
        """By kernel that may call a library, the largest piece of memory it asks for."""

        def largest(kernel: int) -> int:
            results = [nbytes for _, nbytes in self.results.get(kernel, ())]
            return max(self.transient.get(kernel, 0), self.product if kernel in self.products else 0, *results, 0)

        return {kernel: largest(kernel) for kernel in sorted(self.libraries)}

    def reserved(self, schedule: Schedule, releases: Sequence[Sequence[str]] | None = None) -> dict[int, int]:
        """Bytes reserved on each stream when `schedule` is captured alone; see `packed`."""
        return self.packed(schedule, releases)[0]

    def packed(
        self, schedule: Schedule, releases: Sequence[Sequence[str]] | None = None
    ) -> tuple[dict[int, int], dict[int, int]]:
        """Bytes reserved on each stream when `schedule` is captured alone, and of these, by stream, bytes to reserve in
        one piece before: where that takes less than the segments that the allocator would reserve one by one, each for
        what does not fit into those before."""
        reserved, segments = {}, {}
        for stream, steps in self._steps(schedule, releases, set()).items():
            reserved[stream] = _taken(steps, Pool()).reserved
            # In a smaller segment what is left behind its last block may be the best fit, and another cut: hence again.
            peak = _taken(steps, Pool(reserved[stream])).peak if reserved[stream] > one_segment(0) else 0
            if peak and (packed := _taken(steps, Pool(one_segment(peak))).reserved) < reserved[stream]:
                reserved[stream], segments[stream] = packed, one_segment(peak)
        return reserved, segments

    def captured(
        self,
        schedule: Schedule,
        releases: Sequence[Sequence[str]] | None,
        pools: Pools,
        first: Mapping[int, int] = MappingProxyType({}),
    ) -> Pools:
        """`pools` behind a capture of `schedule`, all of whose results are given up in the end.

        releases: results dropped before each launch, as a memory plan has them; by default each is behind its last
        user, which is as soon as can be. first: by stream, bytes reserved in one piece before, on those that have
        nothing of `pools`. O(kernels x blocks on a stream).
        """
        found = pools.copy()
        for stream, steps in self._steps(schedule, releases, found.products).items():
            found.of[stream] = _taken(steps, found.of.get(stream) or Pool(first.get(stream, 0)))
        return found

    def _steps(
        self, schedule: Schedule, releases: Sequence[Sequence[str]] | None, products: set[int]
    ) -> dict[int, list[_Step]]:
        """By stream, what is allocated and freed there. products: streams with a workspace of cuBLAS's; others come
        to them."""
        found: dict[int, list[_Step]] = {}
        held: dict[str, list[_Step]] = {}
        waiting = {name: len(users) for name, users in self.users.items()}
        touched = self._touched if releases is None else {}

        def free(name: str) -> None:
            if name in held:
                held.pop(name).append((name, 0))

        for place, kernel in enumerate(schedule.order):
            for name in releases[place] if releases is not None else ():
                free(name)
            if kernel in self._allocate:
                stream = schedule.stream[kernel]
                steps, transient = found.setdefault(stream, []), self.transient.get(kernel, 0)
                for name, nbytes in self.results.get(kernel, ()):
                    if nbytes:
                        steps.append((name, nbytes))
                        held[name] = steps
                if kernel in self.products and stream not in products:
                    products.add(stream)
                    steps.append((None, self.product))
                if transient:
                    steps += [(kernel, transient), (kernel, 0)]
            for name in touched.get(kernel, ()):
                waiting[name] -= 1
                if not waiting[name]:
                    free(name)
        for name in [*held]:
            free(name)
        return found


def _taken(steps: Iterable[_Step], pool: Pool) -> Pool:
    """`pool` behind them."""
    blocks: dict[str | int | None, Block] = {}
    for what, nbytes in steps:
        if nbytes:
            blocks[what] = pool.allocate(nbytes)
        else:
            pool.free(blocks.pop(what))
    return pool


def is_product(kernel: Kernel) -> bool:
    """True if `kernel` may call cuBLAS: Inductor's `extern_kernels`, but for convolutions, and operators of torch's."""
    owner, *names = kernel.call.removeprefix("torch.ops.").split(".")
    if owner == "extern_kernels":
        return names != ["convolution"]
    return owner == "aten" and bool(names) and names[0] in OPERATORS


def allocations(graph: KernelGraph, needed: Workspaces) -> Allocations:
    """What the kernels of `graph` (sizes bound) allocate. Results of unknown size are as large as what was kept."""
    products = frozenset(i for i, k in enumerate(graph.kernels) if needed.product and is_product(k))
    first = min(products, default=-1)  # the one that cuBLAS allocated a workspace for when it was metered
    own = {b.name: b.nbytes for b in graph.buffers if b.kind == "intermediate" and not b.planned and b.part_of is None}
    results: dict[int, tuple[tuple[str, int], ...]] = {}
    users: dict[str, set[int]] = {}
    for index, kernel in enumerate(graph.kernels):
        makes = [name for name in dict.fromkeys(kernel.writes) if name in own and name not in users]
        if makes:
            results[index] = _sized(makes, own, needed.kept.get(index, 0), needed.product if index == first else 0)
        for name in (*kernel.reads, *kernel.writes):
            whole = graph.buffer(name).part_of or name
            if whole in own:
                users.setdefault(whole, set()).add(index)
    kept = {graph.buffer(name).part_of or name for name in graph.outputs if name is not None}
    return Allocations(
        transient=needed.transient,
        products=products,
        product=needed.product,
        spared=needed.product if needed.replaced and not products else 0,
        results=results,
        users={name: frozenset(kernels) for name, kernels in users.items() if name not in kept},
        libraries=library_kernels(graph),
    )


def allowed(static_bytes: int, least: int, spared: int, extra: int) -> int:
    """Bytes that a schedule may take where one stream takes `least`, the model `static_bytes`, and stock Inductor's
    kernels would take `spared` beside: as much as they, or a tenth of all more, and `extra`."""
    return least + max(spared, int(MORE * (static_bytes + least)), segment_bytes(1)) + extra


def _sized(
    names: Sequence[str], known: Mapping[str, int | str | None], kept: int, product: int
) -> tuple[tuple[str, int], ...]:
    """Bytes of results of one kernel that kept so much; the first of unknown size stands for all of these."""
    sizes = {name: nbytes if isinstance(nbytes := known[name], int) else 0 for name in names}
    unknown = next((name for name in names if not isinstance(known[name], int)), None)
    if unknown is not None:
        rest = kept - sum(sizes.values())
        sizes[unknown] = max(0, rest - product if rest >= product else rest)
    return tuple(sizes.items())


def launched(kernels: Allocations) -> Callable[[Schedule], Schedule]:
    """Makes of a schedule the one to launch: its library kernels gathered, unless that takes more memory."""

    def launch(schedule: Schedule) -> Schedule:
        together = gathered(schedule, kernels.pieces)
        before, after = (sum(kernels.reserved(each).values()) for each in (schedule, together))
        return together if after <= before else renumbered(schedule, kernels.pieces)

    return launch


def squeezing(kernels: Allocations) -> Callable[[Schedule, int], Schedule | None]:
    """Makes of a schedule another, with kernels that allocate on fewer streams, where they take turns, so that they
    allocate at most so many bytes: those that allocate much, or all; None if that is not enough.
    """
    large, every = (frozenset(k for k, nbytes in kernels.pieces.items() if nbytes > least) for least in (SMALL, 0))

    def squeezed(schedule: Schedule, most: int) -> Schedule | None:
        def fits(one: Schedule) -> bool:
            return sum(kernels.reserved(one).values()) <= most

        for moved in dict.fromkeys((large, every)):
            found = on_fewer_streams(schedule, moved, kernels.pieces, fits)
            if found is not None:
                return found if LESS in found.policy else replace(found, policy=f"{found.policy}, {LESS}")
        return None

    return squeezed


def fitting(kernels: Allocations, count: int, static_bytes: int, extra: int) -> Callable[[Schedule], Schedule | None]:
    """Makes of a schedule of `count` kernels one that takes no more than is `allowed`, arenas apart: itself if it may
    be launched so that it fits, else what `squeezing` makes of it."""
    squeezed = squeezing(kernels)
    row = Schedule((0,) * count, tuple(range(count)), ((),) * count)
    most = allowed(static_bytes, sum(kernels.reserved(row).values()), kernels.spared, extra)

    def fits(schedule: Schedule) -> bool:
        return sum(kernels.reserved(schedule).values()) <= most

    def fit(schedule: Schedule) -> Schedule | None:
        if fits(schedule):
            return schedule
        together = gathered(schedule, kernels.pieces)
        return schedule if fits(together) else squeezed(together, most)

    return fit
