"""Predicted timeline of a Schedule on a GPU.

Takes: a KernelGraph, its Profile (durations, grids and blocks), a Schedule, a DeviceSpec. Gives: when each kernel
starts and ends. Must not change: anything. Imports no torch. Deterministic.

The model. A kernel is launched when the kernel before it on its stream has ended and so have those it waits for; it
then takes its ramp (`costs`) until its blocks reach the GPU. Launches are a small interval apart, and at the start of
a replay the streams begin one after the other. Where streams join that are not in step (they never waited for each
other before, the wait lies far back, or the replay has only just begun) the launch comes late.

Blocks are dispatched oldest kernel first, as many as fit, and none of a younger kernel before all of an older one
(Amert et al., RTSS 2017); of kernels that arrive together the one launched first is older. The GPU is one pool of
threads, registers, shared memory and block slots, and a block once placed stays until it ends. While blocks of
memory-bound kernels together ask for more than the memory's bandwidth, all of them slow down in proportion; and every
kernel slows down with the part of the GPU that others hold. A kernel ends with its last block.

Left out: how blocks spread over single SMs, caches (a kernel whose input a neighbour has just written runs faster
than alone), clocks. README.md says what these would change.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.device import DeviceSpec
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.costs import NOTHING, CostModel, KernelCost, kernel_cost
from opara_backend.scheduling.schedule import Schedule, directly_behind

_INSTANT = 1e-12  # seconds; what differs by less is rounding


@dataclass(frozen=True)
class Timeline:
    """When the blocks of each kernel reach the GPU and when the last one ends, in seconds from the program's start."""

    start: tuple[float, ...]
    end: tuple[float, ...]

    @property
    def makespan(self) -> float:
        """Seconds until the last kernel has ended."""
        return max(self.end, default=0.0)


@dataclass(slots=True)
class _Batch:
    """Blocks of one kernel placed together: they end together.

    left: seconds of undisturbed running to go; rate: of these in a second, as it is now, 1 if alone on the GPU.
    """

    kernel: int
    blocks: int
    left: float
    rate: float = 1.0


def simulate(
    graph: KernelGraph, profile: Profile, schedule: Schedule, device: DeviceSpec, costs: CostModel | None = None
) -> Timeline:
    """Run `schedule` through the model. O(kernels x waves x kernels side by side)."""
    return simulator(graph, profile, device, costs)(schedule)


def simulator(
    graph: KernelGraph, profile: Profile, device: DeviceSpec, costs: CostModel | None = None
) -> Callable[[Schedule], Timeline]:
    """`simulate` for many schedules of one graph: what its kernels cost is worked out once."""
    model = costs or CostModel()
    cost = [kernel_cost(kernel, device, model) for kernel in profile.kernels]
    return lambda schedule: _Run(graph, cost, schedule, model).timeline()


def simulate_with_room(graph: KernelGraph, profile: Profile, schedule: Schedule, costs: CostModel) -> Timeline:
    """Run `schedule` on a GPU that has room and bandwidth for everything: no kernel takes longer than alone."""
    ramps = [min(costs.ramp, seconds / 2) for seconds in profile.durations()]
    alone = [KernelCost(r, 1, seconds - r, NOTHING, 0.0) for r, seconds in zip(ramps, profile.durations(), strict=True)]
    return _Run(graph, alone, schedule, replace(costs, interference=0.0)).timeline()


class _Run:
    def __init__(self, graph: KernelGraph, cost: Sequence[KernelCost], schedule: Schedule, costs: CostModel) -> None:
        self.schedule, self.cost, self.costs = schedule, cost, costs
        self.holds = [max(each.share) for each in cost]  # what a block holds of the resource it needs most of
        self.start, self.end = [0.0] * len(graph), [0.0] * len(graph)
        self.unplaced = [cost.blocks for cost in self.cost]
        self.free = [1.0, 1.0, 1.0, 1.0]
        self.batches: list[_Batch] = []
        self.queue: list[int] = []  # kernels on the GPU with blocks not yet placed, oldest first
        # Kernels on their way, a heap: (time, place in launch order, kernel).
        self.arrivals: list[tuple[float, int, int]] = []
        self.place = {kernel: place for place, kernel in enumerate(schedule.order)}
        self.blockers = [0] * len(graph)  # how many kernels each still has to see ended
        self.waiters: list[list[int]] = [[] for _ in range(len(graph))]
        self.joins = [False] * len(graph)  # kernels with more than one to see ended
        self.in_step: set[tuple[int, int]] = set()  # pairs of streams, the lower first, that have waited before
        self.next_launch = 0.0  # when a kernel on another stream than `launching` may be launched
        self.launching = -1
        self.begin = costs.stream_latency * max(0, schedule.streams - 1)
        behind = directly_behind(schedule)
        for kernel in schedule.order:
            self.joins[kernel] = len(behind[kernel]) > 1
            self.blockers[kernel] = len(behind[kernel])
            for awaited in sorted(behind[kernel]):
                self.waiters[awaited].append(kernel)

    def timeline(self) -> Timeline:
        now = self.begin
        roots = [kernel for kernel in self.schedule.order if not self.blockers[kernel]]
        for index, kernel in enumerate(roots):
            self._release(kernel, now + index * self.costs.branch_latency)
        while self.arrivals or self.batches:
            step = self.arrivals[0][0] - now if self.arrivals else math.inf
            for batch in self.batches:
                needed = batch.left / batch.rate
                if needed < step:
                    step = needed
            now += step
            ended = False
            for batch in self.batches:
                batch.left -= step * batch.rate
                if batch.left <= _INSTANT:
                    ended = True
            if ended:
                self._finish(now)
            while self.arrivals and self.arrivals[0][0] <= now + _INSTANT:
                kernel = heapq.heappop(self.arrivals)[2]
                self.start[kernel] = now
                self.queue.append(kernel)
            placed = self._dispatch() if self.queue else False
            if ended or placed:
                self._set_rates()
        return Timeline(tuple(self.start), tuple(self.end))

    def _release(self, kernel: int, now: float) -> None:
        stream = self.schedule.stream[kernel]
        launch = now if stream == self.launching else max(now, self.next_launch)
        self.next_launch, self.launching = launch + self.costs.launch_interval, stream
        latency = self.cost[kernel].ramp
        if self._out_of_step(kernel, now):
            latency += self.costs.sync_latency
        heapq.heappush(self.arrivals, (launch + latency, self.place[kernel], kernel))

    def _out_of_step(self, kernel: int, now: float) -> bool:
        own, waits = self.schedule.stream[kernel], self.schedule.waits[kernel]
        pairs = [(min(own, other), max(own, other)) for other in (self.schedule.stream[w] for w in waits)]
        known = all(pair in self.in_step for pair in pairs)
        self.in_step.update(pairs)
        if not self.joins[kernel]:
            return False
        settled = now - self.begin >= self.costs.settling * (self.schedule.streams - 1)
        return not (known and settled and all(now - self.end[w] <= self.costs.step_memory for w in waits))

    def _finish(self, now: float) -> None:
        ended = [b for b in self.batches if b.left <= _INSTANT]
        self.batches = [b for b in self.batches if b.left > _INSTANT]
        for batch in ended:
            share = self.cost[batch.kernel].share
            self.free = [f + batch.blocks * s for f, s in zip(self.free, share, strict=True)]
        running = {b.kernel for b in self.batches}
        for kernel in sorted({b.kernel for b in ended}):
            if kernel in running or self.unplaced[kernel]:
                continue
            self.end[kernel] = now
            for waiter in self.waiters[kernel]:
                self.blockers[waiter] -= 1
                if not self.blockers[waiter]:
                    self._release(waiter, now)

    def _dispatch(self) -> bool:
        """Place blocks, as many as fit; whether there was room for any."""
        placed = False
        while self.queue:
            kernel = self.queue[0]
            cost = self.cost[kernel]
            blocks = self.unplaced[kernel]
            for free, share in zip(self.free, cost.share, strict=True):
                if share and (fits := math.floor(free / share + 1e-9)) < blocks:
                    blocks = fits
            if blocks > 0:
                self.free = [f - blocks * s for f, s in zip(self.free, cost.share, strict=True)]
                self.unplaced[kernel] -= blocks
                self.batches.append(_Batch(kernel, blocks, cost.seconds))
                placed = True
            if self.unplaced[kernel]:
                break
            self.queue.pop(0)
        return placed

    def _set_rates(self) -> None:
        """How fast each kernel's blocks run: only what begins or ends changes that."""
        held: dict[int, float] = {}
        asked = 0.0
        for batch in self.batches:
            kernel, blocks = batch.kernel, batch.blocks
            held[kernel] = held.get(kernel, 0.0) + blocks * self.holds[kernel]
            asked += blocks * self.cost[kernel].bandwidth
        memory_rate = 1.0 if asked <= 1.0 else 1.0 / asked
        together = math.fsum(held.values())
        for batch in self.batches:
            rate = memory_rate if self.cost[batch.kernel].bandwidth else 1.0
            batch.rate = rate / (1.0 + self.costs.interference * (together - held[batch.kernel]))
