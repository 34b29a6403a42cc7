"""Predicted timeline of a Schedule on a GPU.

Takes: a KernelGraph, its Profile (durations, grids and blocks), a Schedule, a DeviceSpec. Gives: when each kernel
starts and ends. Must not change: anything. Imports no torch. Deterministic.

The model. A kernel may start when the kernel before it on its stream has ended and so have those it waits for; it
then takes `start_latency` (longer after a wait for another stream) until its blocks reach the GPU. Blocks are
dispatched oldest kernel first, as many as fit: the GPU is one pool of threads, registers, shared memory and block
slots, and a block once placed stays until it ends. A block takes the kernel's duration divided by its number of
waves. While blocks of memory-bound kernels together ask for more than the memory's bandwidth, all of them slow down
in proportion. A kernel ends with its last block.

Left out: how blocks spread over single SMs, caches (a kernel whose input a neighbour has just written runs faster
than alone), clocks, instruction mix within an SM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.device import DeviceSpec
from opara_backend.profiling.occupancy import Launch, blocks_per_sm
from opara_backend.profiling.profile import KernelProfile, Profile
from opara_backend.scheduling.schedule import Schedule


@dataclass(frozen=True)
class CostModel:
    """Constants of the model, in seconds and fractions; defaults calibrated on an H200 (bench/kernel_graphs).

    ramp: the part of a kernel's measured duration in which it holds none of the GPU (launch, first loads, drain);
    at most half of it. wait_latency: added if the kernel waits for other streams. bandwidth: share of the vendor's
    memory bandwidth that kernels reach together. stream_latency: what each stream beyond the first costs a replay.
    """

    ramp: float = 2.8e-6
    wait_latency: float = 0.7e-6
    bandwidth: float = 0.6
    stream_latency: float = 1.0e-6


FREE = CostModel(0.0, 0.0, 1.0, 0.0)  # starting and waiting cost nothing


@dataclass(frozen=True)
class Timeline:
    """Start and end of each kernel, in seconds from the start of the program."""

    start: tuple[float, ...]
    end: tuple[float, ...]

    @property
    def makespan(self) -> float:
        """Seconds until the last kernel has ended."""
        return max(self.end, default=0.0)


@dataclass
class _Batch:
    """Blocks of one kernel placed together: they end together. `left`: seconds of undisturbed running to go."""

    kernel: int
    blocks: int
    left: float


def simulate(
    graph: KernelGraph, profile: Profile, schedule: Schedule, device: DeviceSpec, costs: CostModel | None = None
) -> Timeline:
    """Run `schedule` through the model. O(kernels x waves x kernels side by side)."""
    return _Run(graph, profile, schedule, device, costs or CostModel()).timeline()


class _Demand:
    """One kernel in units of the model: blocks, what one block takes of the whole GPU, seconds per block."""

    def __init__(self, profile: KernelProfile, device: DeviceSpec, costs: CostModel) -> None:
        self.ramp = min(costs.ramp, profile.duration / 2)
        held = profile.duration - self.ramp
        launch = max(profile.launches, key=lambda item: item.blocks * item.threads_per_block, default=None)
        if launch is None:
            self.blocks, self.share, self.seconds = 1, (0.0, 0.0, 0.0, 0.0), held
        else:
            self.blocks = launch.blocks
            self.share = _share(launch, device)
            waves = max(1, math.ceil(launch.blocks / (blocks_per_sm(launch, device) * device.sms)))
            self.seconds = held / waves
        asked = profile.nbytes / held / (device.memory_bandwidth * costs.bandwidth) if held else 0.0
        # What the caches serve never reaches memory; alone a kernel cannot ask for more than there is.
        self.bandwidth = min(1.0, asked) if profile.memory_bound else 0.0


def _share(launch: Launch, device: DeviceSpec) -> tuple[float, float, float, float]:
    """Threads, registers, shared memory and slots of one block, as fractions of the whole GPU.

    What limits `blocks_per_sm` is counted as that limit says, so that a kernel alone gets what it got when measured.
    """
    whole = 1.0 / (blocks_per_sm(launch, device) * device.sms)
    reserved = launch.shared_memory + device.reserved_shared_memory_per_block
    shares = [
        launch.threads_per_block / (device.max_threads_per_sm * device.sms),
        launch.registers * launch.threads_per_block / (device.registers_per_sm * device.sms),
        reserved / (device.shared_memory_per_sm * device.sms),
        1.0 / (device.max_blocks_per_sm * device.sms),
    ]
    shares[shares.index(max(shares))] = whole
    threads, registers, shared, slots = (min(share, whole) for share in shares)
    return threads, registers, shared, slots


class _Run:
    def __init__(
        self, graph: KernelGraph, profile: Profile, schedule: Schedule, device: DeviceSpec, costs: CostModel
    ) -> None:
        self.schedule, self.costs = schedule, costs
        self.demand = [_Demand(k, device, costs) for k in profile.kernels]
        count = len(graph)
        self.start, self.end = [0.0] * count, [-1.0] * count
        self.unplaced = [d.blocks for d in self.demand]
        self.free = [1.0, 1.0, 1.0, 1.0]
        self.batches: list[_Batch] = []
        self.queue: list[int] = []  # kernels on the GPU with blocks not yet placed, oldest first
        self.arrivals: list[tuple[float, int]] = []  # kernels on their way, (time, kernel)
        self.blockers = [set(w) for w in schedule.waits]
        self.waiters: dict[int, list[int]] = {}
        previous: dict[int, int] = {}
        for kernel in schedule.order:
            stream = schedule.stream[kernel]
            if stream in previous:
                self.blockers[kernel].add(previous[stream])
            previous[stream] = kernel
            for before in self.blockers[kernel]:
                self.waiters.setdefault(before, []).append(kernel)
        self.place = {kernel: place for place, kernel in enumerate(schedule.order)}

    def timeline(self) -> Timeline:
        now = self.costs.stream_latency * max(0, self.schedule.streams - 1)
        for kernel in self.schedule.order:
            if not self.blockers[kernel]:
                self._release(kernel, now)
        while self.arrivals or self.batches:
            rate = self._memory_rate()
            soonest = min((b.left / self._rate(b, rate) for b in self.batches), default=math.inf)
            arrival = min(self.arrivals)[0] - now if self.arrivals else math.inf
            step = min(soonest, arrival)
            now += step
            for batch in self.batches:
                batch.left -= step * self._rate(batch, rate)
            self._finish(now)
            for time, kernel in sorted(a for a in self.arrivals if a[0] <= now + 1e-15):
                self.arrivals.remove((time, kernel))
                self.start[kernel] = now
                self.queue.append(kernel)
            self._dispatch()
        return Timeline(tuple(self.start), tuple(self.end))

    def _release(self, kernel: int, now: float) -> None:
        latency = self.demand[kernel].ramp + (self.costs.wait_latency if self.schedule.waits[kernel] else 0.0)
        self.arrivals.append((now + latency, kernel))

    def _finish(self, now: float) -> None:
        ended = [b for b in self.batches if b.left <= 1e-12]
        self.batches = [b for b in self.batches if b.left > 1e-12]
        for batch in ended:
            share = self.demand[batch.kernel].share
            self.free = [f + batch.blocks * s for f, s in zip(self.free, share, strict=True)]
        running = {b.kernel for b in self.batches}
        for kernel in sorted({b.kernel for b in ended}, key=self.place.__getitem__):
            if kernel in running or self.unplaced[kernel]:
                continue
            self.end[kernel] = now
            for waiter in self.waiters.get(kernel, ()):
                self.blockers[waiter].discard(kernel)
                if not self.blockers[waiter]:
                    self._release(waiter, now)

    def _dispatch(self) -> None:
        for kernel in list(self.queue):
            demand = self.demand[kernel]
            fits = min(
                (math.floor(f / s + 1e-9) for f, s in zip(self.free, demand.share, strict=True) if s),
                default=demand.blocks,
            )
            blocks = min(self.unplaced[kernel], fits)
            if blocks <= 0:
                continue
            self.free = [f - blocks * s for f, s in zip(self.free, demand.share, strict=True)]
            self.unplaced[kernel] -= blocks
            self.batches.append(_Batch(kernel, blocks, demand.seconds))
            if not self.unplaced[kernel]:
                self.queue.remove(kernel)

    def _memory_rate(self) -> float:
        """How fast memory-bound blocks run: 1 unless together they ask for more than there is."""
        asked = sum(
            self.demand[b.kernel].bandwidth * b.blocks / max(1, self.demand[b.kernel].blocks) for b in self.batches
        )
        return 1.0 if asked <= 1.0 else 1.0 / asked

    def _rate(self, batch: _Batch, memory_rate: float) -> float:
        return memory_rate if self.demand[batch.kernel].bandwidth else 1.0
