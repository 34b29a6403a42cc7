"""Why a replay takes longer than its critical path: streams, launches, contention.

Takes: a KernelGraph, its Profile, a Schedule, and the seconds a replay took (or is predicted to take). Gives: `Gap`.
Must not change: anything. Imports no torch. Deterministic.

Three times of the same schedule, each with one more thing that costs: kernels wait for those ahead of them on their
stream, as if launching cost nothing and the GPU had room for everything; then launching costs what `CostModel` says;
then there is the replay itself, in which kernels wait for room and slow each other down.
"""

from __future__ import annotations

from dataclasses import dataclass

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.bounds import critical_path
from opara_backend.scheduling.costs import FREE, CostModel
from opara_backend.scheduling.schedule import Schedule
from opara_backend.scheduling.simulator import simulate_with_room


@dataclass(frozen=True)
class Gap:
    """Seconds above the critical path, which are their sum.

    streams: independent kernels one after another on a stream. launch: starting kernels, joining streams. contention:
    what is left; negative where kernels run faster beside others than alone, out of the cache for instance.
    """

    critical_path: float
    streams: float
    launch: float
    contention: float


def gap_of(
    graph: KernelGraph, profile: Profile, schedule: Schedule, seconds: float, costs: CostModel | None = None
) -> Gap:
    """The parts of `seconds`, the time of one replay of `schedule`. O(kernels log kernels)."""
    path = critical_path(graph, profile)
    in_order = simulate_with_room(graph, profile, schedule, FREE).makespan
    launched = simulate_with_room(graph, profile, schedule, costs or CostModel()).makespan
    # Each is the last and more; what differs by rounding is the same.
    return Gap(path, max(0.0, in_order - path), max(0.0, launched - in_order), seconds - launched)
