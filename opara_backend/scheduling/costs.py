"""One kernel in the units of the simulator's model: how many blocks, what a block holds of the GPU, for how long.

Takes: a KernelProfile, a DeviceSpec, the model's constants. Gives: a `KernelCost`. Must not change: anything.
Imports no torch. Errors: ValueError for a launch that does not fit the device.

The model. Of its measured duration a kernel spends `ramp` seconds holding nothing; the rest is shared out evenly among
its waves, a wave being as many of its blocks as the device holds at a time. A block of a memory-bound kernel asks for
as much of the memory's bandwidth as its part of the kernel's bytes takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from opara_backend.profiling.device import DeviceSpec
from opara_backend.profiling.occupancy import Launch, blocks_per_sm
from opara_backend.profiling.profile import KernelProfile


@dataclass(frozen=True)
class CostModel:
    """Constants of the model, in seconds and fractions; defaults calibrated on an H200 (bench/calibration.py).

    ramp: the part of a kernel's measured duration in which it holds none of the GPU (launch, first loads, drain);
    at most half of it. bandwidth: share of the vendor's memory bandwidth that kernels reach together. interference:
    how much slower a kernel runs beside others that hold the whole GPU (caches, issue slots), in proportion if less.
    launch_interval: least time between the starts of two kernels. branch_latency: how much later each further stream
    begins. sync_latency: added where streams join that are not in step. settling: how long after the start, per
    stream beyond the first, no streams are in step. step_memory: how long a wait may lie back and still be cheap.
    stream_latency: what each stream beyond the first costs a replay.
    """

    ramp: float = 2.8e-6
    bandwidth: float = 0.9
    interference: float = 0.25
    launch_interval: float = 0.2e-6
    branch_latency: float = 0.7e-6
    sync_latency: float = 1.1e-6
    settling: float = 15e-6
    step_memory: float = 80e-6
    stream_latency: float = 0.3e-6


FREE = CostModel(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # starting and waiting cost nothing
NOTHING = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class KernelCost:
    """ramp: seconds before its blocks reach the GPU. seconds: how long a block runs undisturbed.

    share: what one block holds, as fractions of the whole GPU's threads, registers, shared memory and block slots.
    bandwidth: fraction of the memory's bandwidth that one block asks for, 0 if the kernel is not memory-bound.
    """

    ramp: float
    blocks: int
    seconds: float
    share: tuple[float, float, float, float]
    bandwidth: float


def kernel_cost(profile: KernelProfile, device: DeviceSpec, costs: CostModel) -> KernelCost:
    """What the kernel costs; alone on the GPU, ramp and waves add up to its measured duration.

    Of several launches the largest stands for all. A kernel whose launches nobody knows holds nothing.
    """
    ramp = min(costs.ramp, profile.duration / 2)
    held = profile.duration - ramp
    launch = max(profile.launches, key=lambda item: item.blocks * item.threads_per_block, default=None)
    blocks = resident = 1
    if launch is not None:
        blocks = launch.blocks
        resident = min(blocks, blocks_per_sm(launch, device) * device.sms)
    seconds = held / math.ceil(blocks / resident)
    bandwidth = 0.0
    if profile.memory_bound and seconds:
        asked = profile.nbytes / blocks / seconds / (device.memory_bandwidth * costs.bandwidth)
        # What the caches serve never reaches memory; alone a kernel cannot ask for more than there is.
        bandwidth = min(1.0 / resident, asked)
    return KernelCost(ramp, blocks, seconds, NOTHING if launch is None else _share(launch, device), bandwidth)


def _share(launch: Launch, device: DeviceSpec) -> tuple[float, float, float, float]:
    """What one block holds of the GPU.

    The scarcest resource is counted as `blocks_per_sm` does, in whole blocks per SM: so a kernel alone gets what it got
    when measured, and what is left of it on each SM does not add up to room for another block.
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
