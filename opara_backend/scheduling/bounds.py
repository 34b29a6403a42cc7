"""How fast no schedule can beat.

Takes: a KernelGraph and its Profile. Gives: seconds. Must not change: anything. Imports no torch.

Two bounds, both for the kernels as they are: the chain of dependent kernels that takes longest (critical path), and
the work: a kernel that alone fills a share s of the GPU for d seconds takes at least s x d of the GPU's time.
"""

from __future__ import annotations

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.priorities import longest_remaining_path


def critical_path(graph: KernelGraph, profile: Profile) -> float:
    """Seconds of the slowest chain of dependent kernels."""
    return max(longest_remaining_path(graph, profile.durations()), default=0.0)


def work_bound(profile: Profile) -> float:
    """Seconds the GPU needs if every kernel's share of it were packed without a gap.

    Without a device (a profile from a CPU) nothing runs side by side, and the bound is the sum of durations.
    """
    if profile.device is None:
        return sum(profile.durations())
    return sum(k.duration * min(1.0, k.demand) for k in profile.kernels)


def lower_bound(graph: KernelGraph, profile: Profile) -> float:
    """The larger of critical path and work bound, in seconds."""
    return max(critical_path(graph, profile), work_bound(profile))


def gap(makespan: float, graph: KernelGraph, profile: Profile) -> float:
    """How far `makespan` lies above the bound, as a fraction of it: 0.15 is 15 per cent above."""
    bound = lower_bound(graph, profile)
    return makespan / bound - 1 if bound else 0.0
