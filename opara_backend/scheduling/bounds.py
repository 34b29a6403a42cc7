"""How fast no schedule can beat.

Takes: a KernelGraph and its Profile. Gives: seconds. Must not change: anything. Imports no torch.

Two bounds, both for the kernels as they are, and both hold for every timeline the simulator makes with the same
constants: the chain of dependent kernels that takes longest (critical path), and the work: a block that holds a share
s of the GPU's threads, registers, shared memory or block slots for d seconds takes s x d of the GPU's time, and the
resource of which most is asked decides. Shares of different resources do not add up: kernels that are short of
different ones run side by side.
"""

from __future__ import annotations

import math

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.costs import NOTHING, CostModel, kernel_cost
from opara_backend.scheduling.priorities import longest_remaining_path


def critical_path(graph: KernelGraph, profile: Profile) -> float:
    """Seconds of the slowest chain of dependent kernels."""
    return max(longest_remaining_path(graph, profile.durations()), default=0.0)


def work_bound(profile: Profile, costs: CostModel | None = None) -> float:
    """Seconds the GPU needs if blocks were packed without a gap in its scarcest resource.

    Without a device (a profile from a CPU) nothing runs side by side, and the bound is the sum of durations.
    """
    if profile.device is None:
        return math.fsum(profile.durations())
    found = [kernel_cost(kernel, profile.device, costs or CostModel()) for kernel in profile.kernels]
    return max(math.fsum(k.blocks * k.seconds * k.share[resource] for k in found) for resource in range(len(NOTHING)))


def lower_bound(graph: KernelGraph, profile: Profile, costs: CostModel | None = None) -> float:
    """The larger of critical path and work bound, in seconds."""
    return max(critical_path(graph, profile), work_bound(profile, costs))


def gap(makespan: float, graph: KernelGraph, profile: Profile) -> float:
    """How far `makespan` lies above the bound, as a fraction of it: 0.15 is 15 per cent above."""
    bound = lower_bound(graph, profile)
    return makespan / bound - 1 if bound else 0.0
