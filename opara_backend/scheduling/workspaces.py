"""What kernels allocate themselves beside a schedule's arena, and how much of it is too much.

Takes: a schedule, and what each kernel's library needs. Gives: bytes that torch's allocator will reserve; which
schedules take few enough. Must not change: anything. Imports no torch.

A convolution allocates its workspace when it is launched and frees it when it is queued, and some make their results
themselves. The allocator hands freed memory on to what is launched later on the same stream, and to no other stream,
and reserves 2 or 20 MiB for less (`scheduling.segments`). cuBLAS keeps one workspace for each stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from opara_backend.kernel_graph import Kernel, KernelGraph
from opara_backend.scheduling.gathering import gathered, library_kernels, on_fewer_streams
from opara_backend.scheduling.schedule import Schedule
from opara_backend.scheduling.segments import SMALL, Block, Pool, segment_bytes

OPERATORS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_int_mm", "_scaled_mm", "linear", "matmul")
MORE = 0.1  # of what model and one stream take together is never too much


@dataclass(frozen=True)
class Workspaces:
    """What libraries need, in bytes. transient: by kernel, while it runs; product: per stream with products.

    replaced: True if kernels of this backend's stand for products, so that stock Inductor's would need `product`, too.
    """

    transient: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    product: int = 0
    replaced: bool = False


NONE = Workspaces()
LESS = "less memory"  # said of the policy of a schedule that was made to fit


@dataclass(frozen=True)
class Allocations:
    """What the kernels of a graph allocate, in bytes.

    transient: by kernel, while it runs. products: kernels that keep `product` on their stream. spared: what those of
    stock Inductor would keep beside. results: by kernel, buffers that it makes itself. users: of each of those that
    end, the kernels that touch it.
    """

    transient: Mapping[int, int]
    products: frozenset[int]
    product: int
    spared: int
    results: Mapping[int, tuple[tuple[str, int], ...]]
    users: Mapping[str, frozenset[int]]

    def of(self, kernel: int) -> int:
        """What `kernel` asks for, at most in one piece."""
        pieces = [nbytes for _, nbytes in self.results.get(kernel, ())]
        return max(self.transient.get(kernel, 0), self.product if kernel in self.products else 0, *pieces, 0)

    def reserved(self, schedule: Schedule, releases: Sequence[Sequence[str]] | None = None) -> dict[int, int]:
        """Bytes reserved on each stream when `schedule` is captured.

        releases: results dropped before each launch, as a memory plan has them; by default each is behind its last
        user, which is as soon as can be. O(kernels x blocks on a stream).
        """
        pools: dict[int, Pool] = {}
        blocks: dict[str, tuple[Pool, Block]] = {}
        waiting = {name: len(users) for name, users in self.users.items()}
        touched: dict[int, list[str]] = {}
        for name, users in self.users.items() if releases is None else ():
            for kernel in users:
                touched.setdefault(kernel, []).append(name)
        kept: set[int] = set()

        def free(name: str) -> None:
            if name in blocks:
                pool, block = blocks.pop(name)
                pool.free(block)

        for place, kernel in enumerate(schedule.order):
            for name in releases[place] if releases is not None else ():
                free(name)
            stream = schedule.stream[kernel]
            makes, transient = self.results.get(kernel, ()), self.transient.get(kernel, 0)
            if makes or transient or kernel in self.products:
                pool = pools.setdefault(stream, Pool())
                for name, nbytes in makes:
                    blocks[name] = pool, pool.allocate(nbytes)
                if kernel in self.products and stream not in kept:
                    kept.add(stream)
                    pool.allocate(self.product)
                pool.free(pool.allocate(transient))
            for name in touched.get(kernel, ()):
                waiting[name] -= 1
                if not waiting[name]:
                    free(name)
        return {stream: pool.reserved for stream, pool in pools.items()}


def is_product(kernel: Kernel) -> bool:
    """True if `kernel` may call cuBLAS: Inductor's `extern_kernels`, but for convolutions, and operators of torch's."""
    owner, *names = kernel.call.removeprefix("torch.ops.").split(".")
    if owner == "extern_kernels":
        return names != ["convolution"]
    return owner == "aten" and bool(names) and names[0] in OPERATORS


def allocations(graph: KernelGraph, needed: Workspaces) -> Allocations:
    """What the kernels of `graph` (sizes bound) allocate. A result of unknown size counts as nothing."""
    own = {b.name: b.nbytes for b in graph.buffers if b.kind == "intermediate" and not b.planned and b.part_of is None}
    results: dict[int, list[tuple[str, int]]] = {}
    users: dict[str, set[int]] = {}
    for index, kernel in enumerate(graph.kernels):
        for name in kernel.writes:
            if name in own and name not in users and isinstance(nbytes := own[name], int):
                results.setdefault(index, []).append((name, nbytes))
        for name in (*kernel.reads, *kernel.writes):
            whole = graph.buffer(name).part_of or name
            if whole in own:
                users.setdefault(whole, set()).add(index)
    kept = {graph.buffer(name).part_of or name for name in graph.outputs if name is not None}
    products = frozenset(i for i, k in enumerate(graph.kernels) if needed.product and is_product(k))
    return Allocations(
        transient=needed.transient,
        products=products,
        product=needed.product,
        spared=needed.product if needed.replaced and not products else 0,
        results={kernel: tuple(makes) for kernel, makes in results.items()},
        users={name: frozenset(kernels) for name, kernels in users.items() if name not in kept},
    )


def allowed(static_bytes: int, least: int, spared: int, extra: int) -> int:
    """Bytes that a schedule may take where one stream takes `least`, the model `static_bytes`, and stock Inductor's
    kernels would take `spared` beside: as much as they, or a tenth of all more, and `extra`."""
    return least + max(spared, int(MORE * (static_bytes + least)), segment_bytes(1)) + extra


def pieces(graph: KernelGraph, needed: Workspaces) -> dict[int, int]:
    """By kernel that may call a library, the largest piece of memory it asks for, in bytes."""
    kernels = allocations(graph, needed)
    return {kernel: kernels.of(kernel) for kernel in library_kernels(graph)}


def launched(graph: KernelGraph, needed: Workspaces) -> Callable[[Schedule], Schedule]:
    """Makes of a schedule the one to launch: its library kernels gathered, unless that takes more memory."""
    kernels, asked = allocations(graph, needed), pieces(graph, needed)

    def launch(schedule: Schedule) -> Schedule:
        together = gathered(schedule, asked)
        before, after = (sum(kernels.reserved(each).values()) for each in (schedule, together))
        return together if after <= before else schedule

    return launch


def fitting(
    graph: KernelGraph, needed: Workspaces, static_bytes: int, extra: int
) -> Callable[[Schedule], Schedule | None]:
    """Makes of a schedule one whose kernels allocate no more than is `allowed`, arenas apart.

    That is the schedule itself if it may be launched so that it fits, else one with kernels that allocate much on fewer
    streams, where they take turns; None if that is not enough.
    """
    kernels, asked = allocations(graph, needed), pieces(graph, needed)
    large = frozenset(kernel for kernel, nbytes in asked.items() if nbytes > SMALL)
    row = Schedule((0,) * len(graph), tuple(range(len(graph))), ((),) * len(graph))
    most = allowed(static_bytes, sum(kernels.reserved(row).values()), kernels.spared, extra)

    def fits(schedule: Schedule) -> bool:
        return sum(kernels.reserved(schedule).values()) <= most

    def fit(schedule: Schedule) -> Schedule | None:
        if fits(schedule):
            return schedule
        together = gathered(schedule, asked)
        if fits(together):
            return schedule
        found = on_fewer_streams(together, large, asked, fits)
        return None if found is None else replace(found, policy=f"{schedule.policy}, {LESS}")

    return fit
