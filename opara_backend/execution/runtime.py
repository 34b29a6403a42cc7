"""One compiled graph, called: decides per concrete shape how it runs, and keeps calls apart.

Takes: a Program, its KernelGraph, Options. Gives: a callable with stock Inductor's calling convention (a list of
arguments that it empties, a tuple of outputs).
Must not change: what the program means. The first call of a shape *is* one plain run in program order; profiling
and capture come after it and put back whatever state they touch, so side effects happen exactly once.

Calls are serialised by a lock, and a call on another stream than the last one's waits for that stream: all captures
of one graph share an arena's lifetime and the same static inputs, and never run at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from opara_backend import fallback, upstream
from opara_backend.execution import host
from opara_backend.execution.host import Plan
from opara_backend.execution.in_order import InOrder, Spare
from opara_backend.execution.program import Program
from opara_backend.execution.sightings import Sightings
from opara_backend.fallback import Fallback, FallbackReason
from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import MemoryPlanError, lifetimes, plan_memory, verify_memory
from opara_backend.options import Options
from opara_backend.profiling.profile import Profile, build_profile
from opara_backend.report import annotate
from opara_backend.report.record import GraphRecord, listeners, publish
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.schedule import Schedule, ScheduleError, verify
from opara_backend.scheduling.search import candidates
from opara_backend.scheduling.workspaces import NONE, Allocations, allocations, fitting, launched

log = logging.getLogger(__name__)

Executable = Callable[[Sequence[Any]], tuple[Any, ...]]

# Shapes planned on the CPU. Any other runs as well, in program order; to give one up for it, and it for that one again,
# would plan at every call.
PLANS_KEPT = 256


class Runtime:
    """The callable of one compiled graph. `record` is what reports read."""

    def __init__(self, program: Program, graph: KernelGraph, options: Options) -> None:
        self.graph, self.options, self.generated = graph, options, program
        self.program = annotate.named_kernels(program, graph) if options.annotate else program
        compile_id = upstream.current_compile_id()
        self.name = f"opara graph {compile_id}" if compile_id is not None else "opara graph"
        self.record = GraphRecord(graph, options, program.rewrites, compile_id=compile_id)
        self.record.lowered()
        self._lock = threading.Lock()
        self._executables: dict[tuple[Any, ...], Executable] = {}
        self._seen_before, self._spare = Sightings(), Spare()
        self._scalars: tuple[int, ...] | None = None
        self._has_shapes = True  # whether calls can differ in shape; known from the first one on
        self._refused: Fallback | None = None
        self._cuda: Any = None  # lane of the captured graphs, made when first needed
        self.alternatives: tuple[Runtime, ...] = ()  # the same graph lowered otherwise, never called themselves
        # Where the host decides in the middle of a program, it can only be run in program order.
        self.plannable = len(graph.segments) == 1 and bool(graph.kernels)
        # And what it looks at meanwhile is not written down, so only a program in one piece is known well enough.
        self.lives = lifetimes(graph) if self.plannable else None
        publish(self.record)

    def __call__(self, args: list[Any]) -> tuple[Any, ...]:
        given = list(args)
        args.clear()
        if listeners.get():
            publish(self.record)
        if self.graph.device == "cpu":
            self.record.other_calls += 1
            self.refuse_again()
            if not self.plannable:
                return host.run_unplanned(self.program, given, self.lives)
            key = self._key(given) if self._has_shapes else ()
            found = self._executables.get(key)
            if found is not None:
                return found(given)
            with self._lock:
                worth = len(self._executables) < PLANS_KEPT and self._seen_before(key)
            return self._first_call(key, given) if worth else host.run_unplanned(self.program, given, self.lives)
        if self._cuda is None:
            from opara_backend.execution.lane import CudaLane

            with self._lock:  # two lanes would not wait for each other
                self._cuda = self._cuda or CudaLane(self)
        if not self._has_shapes:
            return self._cuda((), given)
        for position in self.program.number_inputs:  # somebody may change it while it is captured
            given[position] = given[position].clone()
        return self._cuda(self._key(given), given)

    # --- the first call of a shape -------------------------------------------------------------------------------

    def _first_call(self, key: tuple[Any, ...], args: Sequence[Any]) -> tuple[Any, ...]:
        """CPU: run once in program order, and plan from what that run showed.

        The run itself holds no lock: an operator may call the compiled model it is part of.
        """
        with self.record.stage("first_run"):
            seen = host.observe(self.program, args, self.lives)
        with self._lock:
            if key in self._executables or not self.plannable:  # another thread was faster
                return seen.outputs
            graph = self.graph.bind(seen.nbytes)
            profile = build_profile(graph, seen.durations, None, None)
            try:
                with self.record.stage("schedule"):
                    (schedule,) = self.schedules(graph, profile)
                with self.record.stage("plan"):
                    plan = self.plan(graph, profile, schedule, captured=False)
            except (ScheduleError, MemoryPlanError) as error:
                self.plannable = False
                self.step_down(FallbackReason.INVALID_SCHEDULE, str(error), error)
                return seen.outputs
            self._executables[key] = InOrder(self.program, plan, self._spare)
            self.record.planned(key, plan, captured=False)
        return seen.outputs

    def schedules(
        self,
        graph: KernelGraph,
        profile: Profile,
        near: Schedule | None = None,
        kernels: Allocations | None = None,
        static_bytes: int = 0,
    ) -> tuple[Schedule, ...]:
        """The schedules the options ask for: one, or with `policy="auto"` several to choose from. `plan` verifies each.

        near: what won for another shape of the same graph, if anything did. kernels: what those of `graph`
        allocate; of several schedules none takes more of it than the options allow beside `static_bytes` of weights.
        Without a device nothing runs side by side, so there is nothing to choose by measurement: the paper's policy.
        """
        kernels = kernels or allocations(graph, NONE)
        found: dict[tuple[object, ...], Schedule] = {}
        for schedule in map(launched(kernels), self._as_asked(graph, profile, near, kernels, static_bytes)):
            found.setdefault(schedule.launches, schedule)
        return tuple(found.values())

    def _as_asked(
        self, graph: KernelGraph, profile: Profile, near: Schedule | None, kernels: Allocations, static_bytes: int
    ) -> tuple[Schedule, ...]:
        """The schedules as policies make them."""
        chosen = self.options
        if chosen.policy == "auto" and profile.device is not None:
            width, over = chosen.streams, chosen.in_place
            fit = fitting(kernels, len(graph), static_bytes, chosen.extra_memory << 20)
            how: dict[str, Any] = {"count": chosen.candidates, "streams": width, "near": near, "in_place": over}
            return candidates(graph, profile, fit=fit, **how)
        policy = "opara" if chosen.policy == "auto" else chosen.policy
        return (build(graph, profile, policy=policy, launch_order=chosen.order, streams=chosen.streams),)

    def plan(self, graph: KernelGraph, profile: Profile, schedule: Schedule, *, captured: bool) -> Plan:
        """Place the buffers of `graph` (sizes bound) for `schedule`, and check the placement.

        captured: outputs will be copied out of the arena; otherwise they are handed out and must not lie in it.
        """
        owned = [] if captured else [name for name in graph.outputs if name is not None]
        start = time.perf_counter()
        verify(graph, schedule)  # before planning, which believes it
        checked = time.perf_counter()
        memory = plan_memory(graph, schedule, exclude=owned, in_place=self.options.in_place)
        planned = time.perf_counter()
        verify_memory(graph, schedule, memory)
        return Plan(graph, profile, schedule, memory, checked - start + time.perf_counter() - planned)

    def step_down(self, reason: FallbackReason, detail: str = "", error: BaseException | None = None) -> Fallback:
        try:
            step = fallback.step_down(reason, detail, policy=self.options.fallback, error=error)
        except fallback.OparaFallbackError as refused:
            if reason is not FallbackReason.CAPTURE_LIMIT:  # which replays may lift
                self._refused = refused.fallback
            raise
        self.record.fallbacks.append(step)
        return step

    def refuse_again(self) -> None:
        """Raise what `fallback="error"` raised before, for a call that would fall back for the same reason."""
        if self._refused is not None:
            raise fallback.OparaFallbackError(self._refused)

    def shape_of(self, key: tuple[Any, ...]) -> tuple[Any, ...]:
        """What of a key a schedule depends on: not the numbers, which only launches are given."""
        return key[: len(key) - len(self.program.number_inputs)]

    def _key(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """What tells one concrete shape from another: all numbers, and the layouts of tensors with symbolic ones."""
        if self._scalars is None:
            self._scalars = tuple(i for i, a in enumerate(args) if not isinstance(a, torch.Tensor))
        dynamic, numbers = self.program.dynamic_inputs, self.program.number_inputs
        if not self._scalars and not dynamic and not numbers:
            self._has_shapes = False
            return ()
        layouts = tuple((args[i].shape, args[i].stride()) for i in dynamic)
        values = tuple(repr(args[i].item()) for i in numbers)  # -0.0 is not 0.0, and NaN is itself
        return (*(_hashable(args[i]) for i in self._scalars), *layouts, *values)


def _hashable(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float | str) else id(value)
