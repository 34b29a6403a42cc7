"""How much of a GPU one kernel launch takes: blocks per SM, what limits them, waves, and a share of the whole GPU.

Takes: a `Launch` (grid, block, registers per thread, shared memory per block) and a `DeviceSpec`.
Gives: plain numbers. A launch that cannot run on the device is a ValueError naming the resource, what was found and
what is accepted. Must not change: anything; every function is pure, and none imports torch.

The rules are those of NVIDIA's occupancy calculator (`cuda_occupancy.h`), with the L1 / shared memory split set to the
most shared memory, which the driver chooses by itself for a kernel that needs it:
  threads        warps are indivisible: a block takes ceil(threads / 32) of the SM's warp slots
  blocks         the SM's block slots
  registers      handed out per warp in units of 256, from one of the SM's 4 partitions, each owning a quarter; a warp
                 never straddles two. A launch is refused if its warps, rounded up to 4, would exceed a block's budget
  shared memory  static + dynamic + what the driver reserves per block, in units of 128 bytes
Not modelled: thread block clusters and named barriers, which a Launch does not record.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from opara_backend.profiling.device import DeviceSpec

Limiter = Literal["grid", "threads", "blocks", "registers", "shared memory"]


@dataclass(frozen=True)
class Launch:
    """One kernel launch: registers are per thread, shared memory is bytes per block."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    registers: int
    static_shared: int
    dynamic_shared: int

    def __post_init__(self) -> None:
        for field, extent in (("grid", self.grid), ("block", self.block)):
            if len(extent) != 3 or min(extent) < 1:
                raise ValueError(f"Launch.{field}: found {extent}, accepted three integers of at least 1")
        for field, amount in (
            ("registers", self.registers),
            ("static_shared", self.static_shared),
            ("dynamic_shared", self.dynamic_shared),
        ):
            if amount < 0:
                raise ValueError(f"Launch.{field}: found {amount}, accepted an integer of at least 0")

    @property
    def threads_per_block(self) -> int:
        """Threads in one block."""
        return prod(self.block)

    @property
    def blocks(self) -> int:
        """Blocks in the grid."""
        return prod(self.grid)

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory one block asks for, without what the driver adds."""
        return self.static_shared + self.dynamic_shared


def blocks_per_sm(launch: Launch, spec: DeviceSpec) -> int:
    """Blocks of this kernel that one SM holds at the same time; at least 1, or ValueError."""
    return min(limit for _, limit in _limits(launch, spec))


def limiter(launch: Launch, spec: DeviceSpec) -> Limiter:
    """What keeps more of this kernel from being resident.

    "grid" means that all its blocks are resident at once with room to spare, so the launch itself is too small to
    fill the GPU. Otherwise the SM resource that runs out first; of several, the first in the module's order.
    """
    limits = _limits(launch, spec)
    tightest = min(limits, key=lambda entry: entry[1])
    return "grid" if launch.blocks < tightest[1] * spec.sms else tightest[0]


def occupancy(launch: Launch, spec: DeviceSpec) -> float:
    """Resident warps over the warps an SM could hold, on an SM full of this kernel; in (0, 1]."""
    return blocks_per_sm(launch, spec) * _warps(launch, spec) * spec.warp_size / spec.max_threads_per_sm


def waves(launch: Launch, spec: DeviceSpec) -> float:
    """How many times this kernel's grid fills the whole GPU; under 1 it leaves SMs or room on them free."""
    return launch.blocks / (blocks_per_sm(launch, spec) * spec.sms)


def gpu_share(launch: Launch, spec: DeviceSpec) -> float:
    """The largest share, of the whole GPU's threads, block slots, registers or shared memory, it holds at once.

    In (0, 1]. A kernel of many waves holds what its resident blocks hold. Less than 1 even then is no error: what one
    more block of this kernel does not fit into, a smaller block of another kernel may.

    The demand by which the paper's Algorithm 2 launches the least demanding operator first. The paper compares
    per-block demands for threads, registers and shared memory, as one block describes all blocks of a kernel, and
    leaves open how three amounts become one order. Each is a share of what an SM has, and the largest decides what
    still fits beside the kernel, so the largest is taken. It is counted for all resident blocks: a kernel of one big
    block leaves 131 of 132 SMs free, one of a thousand small blocks none, and least-first exists to put off the kernel
    that would block others.
    """
    resident = min(launch.blocks, blocks_per_sm(launch, spec) * spec.sms)
    of_one_sm = max(
        _warps(launch, spec) * spec.warp_size / spec.max_threads_per_sm,
        1 / spec.max_blocks_per_sm,
        _registers(launch, spec) / spec.registers_per_sm,
        _shared(launch, spec) / spec.shared_memory_per_sm,
    )
    # Shares such as 1/3 do not sum to exactly 1 in floating point.
    return min(1.0, of_one_sm * resident / spec.sms)


def _limits(launch: Launch, spec: DeviceSpec) -> tuple[tuple[Limiter, int], ...]:
    """Blocks per SM as each resource alone would allow, in the module's order; ValueError if even one does not fit."""
    warps, per_warp, shared = _warps(launch, spec), _registers_per_warp(launch, spec), _shared(launch, spec)
    granularity = spec.warp_allocation_granularity
    for resource, found, accepted in (
        ("threads per block", launch.threads_per_block, spec.max_threads_per_block),
        ("registers per thread", launch.registers, spec.max_registers_per_thread),
        ("registers per block", per_warp * _round_up(warps, granularity), spec.max_registers_per_block),
        ("shared memory per block in bytes", launch.shared_memory, spec.max_shared_memory_per_block),
    ):
        if found > accepted:
            raise ValueError(f"launch does not fit {spec.name}: {resource}: found {found}, accepted at most {accepted}")
    # A resource the kernel does not use allows as many blocks as there are slots.
    warps_by_registers = spec.registers_per_sm // granularity // per_warp * granularity if per_warp else None
    return (
        ("threads", spec.max_threads_per_sm // spec.warp_size // warps),
        ("blocks", spec.max_blocks_per_sm),
        ("registers", spec.max_blocks_per_sm if warps_by_registers is None else warps_by_registers // warps),
        ("shared memory", spec.shared_memory_per_sm // shared if shared else spec.max_blocks_per_sm),
    )


def _warps(launch: Launch, spec: DeviceSpec) -> int:
    return -(-launch.threads_per_block // spec.warp_size)


def _registers_per_warp(launch: Launch, spec: DeviceSpec) -> int:
    return _round_up(launch.registers * spec.warp_size, spec.register_allocation_unit)


def _registers(launch: Launch, spec: DeviceSpec) -> int:
    return _registers_per_warp(launch, spec) * _warps(launch, spec)


def _shared(launch: Launch, spec: DeviceSpec) -> int:
    wanted = launch.shared_memory + spec.reserved_shared_memory_per_block
    return _round_up(wanted, spec.shared_memory_allocation_unit)


def _round_up(amount: int, unit: int) -> int:
    return -(-amount // unit) * unit
