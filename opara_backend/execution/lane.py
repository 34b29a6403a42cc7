"""The CUDA lane of a Runtime: from the first call of a shape to replays of its captured graph.

Takes: a Runtime. Gives: outputs, by replay where a capture fits the arguments, else by the next rung of the ladder.
Must not change: state outside the program's intermediates, beyond one run's worth per call: what profiling writes
(static inputs, the random generator) is put back.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from opara_backend import upstream
from opara_backend.execution import cuda_graph, host
from opara_backend.execution.alternatives import Kept, capture_again, capture_fastest
from opara_backend.execution.arguments import Layouts, StaticArguments
from opara_backend.execution.captures import Captures
from opara_backend.execution.cuda_graph import CapturedGraph
from opara_backend.execution.first_run import (
    cublas_workspace_bytes,
    leaves_nothing,
    observe_apart,
    observe_metered,
    workspaces,
)
from opara_backend.execution.host import Plan, SharedMemory
from opara_backend.execution.in_order import InOrder
from opara_backend.execution.outputs import Loans, OutputSpec
from opara_backend.execution.race import Memory
from opara_backend.execution.sightings import Sightings
from opara_backend.execution.state import state_kept
from opara_backend.fallback import FallbackReason, OparaFallbackError, why_host
from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import MemoryPlanError
from opara_backend.profiling.profile import build_profile
from opara_backend.report import annotate
from opara_backend.scheduling.policies import in_a_row
from opara_backend.scheduling.schedule import Schedule, ScheduleError
from opara_backend.scheduling.workspaces import Workspaces

if TYPE_CHECKING:
    from opara_backend.execution.runtime import Runtime

Key = tuple[Any, ...]

DECISIONS_KEPT = 256  # plans remembered of shapes that were captured once


class _Captured:
    """One captured shape: the graph, the arguments it reads, and how to hand out its outputs."""

    def __init__(
        self, graph: CapturedGraph, arguments: StaticArguments, outputs: OutputSpec, loans: Loans | None, name: str = ""
    ) -> None:
        self.name = name
        self.graph, self.arguments, self.outputs, self.loans = graph, arguments, outputs, loans
        self.accepts, self.expired = arguments.accept, arguments.expired

    def __call__(self, args: Sequence[Any], stream: torch.cuda.Stream) -> tuple[Any, ...]:
        self.arguments.load(args)
        ended: frozenset[int] = frozenset()
        if self.loans is not None:
            ended = self.loans.end()  # only now: an output of the last call may have been an argument of this one
        self.graph.replay(stream)
        self.arguments.store(args, ended)
        return self.outputs.collect(args, self.loans)

    def reset(self) -> None:
        """Give the graph's memory back, and take back outputs that lie in it."""
        if self.loans is not None:
            self.loans.end(self.outputs)
        self.graph.reset()


class _NamedCaptured(_Captured):
    """One whose replays profilers can tell."""

    def __call__(self, args: Sequence[Any], stream: torch.cuda.Stream) -> tuple[Any, ...]:
        with annotate.ranged(f"{self.name}: replay"):
            return super().__call__(args, stream)


_LANES: weakref.WeakSet[CudaLane] = weakref.WeakSet()
_LANES_LOCK = threading.Lock()


def give_up_expired() -> None:
    """Give back the memory of graphs whose parameters are gone, in every lane.

    A dropped model's lane may be part of a reference cycle, and Python's collector, which counts objects and not what
    they hold of a GPU, may not look at it for minutes.
    """
    with _LANES_LOCK:
        lanes = tuple(_LANES)
    for lane in lanes:
        lane.give_up_expired()


class CudaLane:
    """Calls of one Runtime on one CUDA device."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.device = torch.device(runtime.graph.device)
        self._lock = threading.RLock()  # an operator may call the compiled model it is part of
        self._captures = Captures(runtime.options.max_captures, runtime.record.forget)
        self._decided: OrderedDict[Key, tuple[Runtime, Plan]] = OrderedDict()  # for the same shape at other addresses
        self._uncaptured: dict[Key, Callable[[Sequence[Any]], tuple[Any, ...]]] = {}
        self._seen_before = Sightings()
        self._pool: Any = None
        self._shared = SharedMemory(self.device)  # replays of one lane never overlap, so neither need their arenas
        self._loans = None if runtime.options.copy_outputs else Loans()
        self._last_stream: torch.cuda.Stream | None = None
        self._last_key: Any = None  # of that stream
        self._layouts: Layouts | None = None  # of static arguments, once they have been seen
        self._never = self._why_never()
        self._warm = False  # whether all kernels have run once
        self._process = os.getpid()
        with _LANES_LOCK:
            _LANES.add(self)

    def __call__(self, key: Key, args: list[Any]) -> tuple[Any, ...]:
        if os.getpid() != self._process:  # before the lock, which the fork may have copied locked
            raise RuntimeError(
                "a model compiled on CUDA was called in a forked process; CUDA does not survive a fork: "
                "start workers with the 'spawn' method and compile there"
            )
        if upstream.current_device() == self.device.index:
            return self._called(key, args)
        with torch.cuda.device(self.device):
            return self._called(key, args)

    def _called(self, key: Key, args: list[Any]) -> tuple[Any, ...]:
        """The outputs of one call, made on this lane's device."""
        if upstream.is_capturing():  # somebody else's capture takes the kernels one by one
            self._check_layouts(args)
            return self._run_plainly(args)
        with self._lock:
            stream = self._follow_last_call()
            served = self._replayed(key, args, stream)
            if served is not None:
                return served
            self._check_layouts(args)
            self.runtime.refuse_again()
            self.runtime.record.other_calls += 1
            again, plain = self._seen_before(key), self._uncaptured.get(key)
            if plain is None and self._warm and not (again and self._may_capture()):
                plain = self._run_plainly  # by kernels that have run before, and so have been tuned
        if plain is not None:  # without the lock: such a run shares nothing
            return plain(args)
        # Tuned kernels need not wait while something else is compiled or captured; the next call may capture.
        if not cuda_graph.EXCLUSIVE.acquire(blocking=not self._warm):
            return self._run_plainly(args)
        try:
            with self._lock:
                served = self._replayed(key, args, self._follow_last_call())  # another thread may have been faster
                if served is not None:
                    return served
                self.runtime.refuse_again()
                with annotate.stage(self.runtime.options.annotate, self.runtime.name, "first call"):
                    return self._first_call(key, args, again and self._may_capture())
        finally:
            cuda_graph.EXCLUSIVE.release()

    def _follow_last_call(self) -> torch.cuda.Stream:
        """Order this call behind the last one: they share static inputs, an arena and the program's state."""
        key = upstream.current_stream_key(self.device.index)
        if self._last_stream is not None and key is not None and key == self._last_key:
            return self._last_stream
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None and self._last_stream != stream:
            stream.wait_stream(self._last_stream)
        self._last_stream, self._last_key = stream, key
        return stream

    def _replayed(self, key: Key, args: list[Any], stream: torch.cuda.Stream) -> tuple[Any, ...] | None:
        """The outputs by replay on `stream`, the current one; None if no graph fits the call."""
        captured = self._captures.find(key, args)
        if captured is None:
            return None
        self.runtime.record.replays += 1
        outputs: tuple[Any, ...] = captured(args, stream)
        return outputs

    def _check_layouts(self, args: Sequence[Any]) -> None:
        """Refuse parameters that kernels would misread. Replays do not ask: theirs lie where they did."""
        if self._layouts is None:
            self._layouts = Layouts(self.runtime.program, args)
        self._layouts.check(args)

    def _run_plainly(self, args: Sequence[Any]) -> tuple[Any, ...]:
        return host.run_unplanned(self.runtime.program, args, self.runtime.lives)

    def _may_capture(self) -> bool:
        """False where captures are impossible, or do not pay for themselves: shapes that have no graph then stay
        without one, so that a server settles."""
        if self._never:
            return False
        if not self._captures.may_make_another():
            if not self.runtime.record.fell_back(FallbackReason.CAPTURE_LIMIT):
                limit = self.runtime.options.max_captures
                self.runtime.step_down(FallbackReason.CAPTURE_LIMIT, f"more shapes or moving parameters than {limit}")
            return False
        return True

    def _why_never(self) -> bool:
        """True if no call of this graph can be captured; says why."""
        graph, options = self.runtime.graph, self.runtime.options
        if not graph.kernels:
            return True
        if (needs_host := why_host(graph)) is not None:
            self.runtime.step_down(*needs_host)
            return True
        if not options.cuda_graph:
            self.runtime.step_down(FallbackReason.CAPTURE_OFF)
        return not options.cuda_graph

    # --- the first call of a shape -------------------------------------------------------------------------------

    def _first_call(self, key: Key, args: Sequence[Any], worth: bool) -> tuple[Any, ...]:
        """Run once in program order, which is the call; then, if that is `worth` it, profile, schedule and capture."""
        program, graph, lives = self.runtime.program, self.runtime.graph, self.runtime.lives
        with self.runtime.record.stage("first_run"):
            if not worth:
                seen = host.observe(program, args, lives)
            else:
                observe = observe_apart if leaves_nothing(graph) else observe_metered
                seen = observe(program, graph, args, lives)
        self._warm = True
        if not worth:
            return seen.outputs
        graph = graph.bind(seen.nbytes)
        try:
            self._capture(key, graph, args, workspaces(program, seen, cublas_workspace_bytes(self.device)))
        except OparaFallbackError:
            raise
        except torch.OutOfMemoryError as error:
            self.release()
            self._run_uncaptured(key, graph, seen.durations)
            self.runtime.step_down(FallbackReason.OUT_OF_MEMORY, f"capturing shape {key}", error)
        except (ScheduleError, MemoryPlanError) as error:
            self._never = True
            self.runtime.step_down(FallbackReason.INVALID_SCHEDULE, str(error), error)
        except Exception as error:
            self._run_uncaptured(key, graph, seen.durations)
            self.runtime.step_down(FallbackReason.CAPTURE_FAILED, f"shape {key}", error)
        return seen.outputs

    def _run_uncaptured(self, key: Key, graph: KernelGraph, durations: Sequence[float]) -> None:
        """From now on run shape `key` in order; what failed once is not tried again for any new shape."""
        self._never = True
        try:
            profile = build_profile(graph, durations, None, None)
            plan = self.runtime.plan(graph, profile, in_a_row(graph), captured=False)
        except Exception as error:  # then without a plan: what works for every program
            self.runtime.step_down(FallbackReason.INVALID_SCHEDULE, str(error), error)
            return
        self._uncaptured[key] = InOrder(self.runtime.program, plan)
        self.runtime.record.planned(key, plan, captured=False)

    def _capture(self, key: Key, graph: KernelGraph, args: Sequence[Any], needed: Workspaces) -> None:
        program = self.runtime.program
        arguments = StaticArguments(program, graph, args)
        if self._loans is not None:  # all shapes share an arena; what was lent as an argument has just been copied
            self._loans.end()
        give_up_expired()
        self._captures.make_room()
        # What the first run left, and pools of graphs that are gone, are of no use to anyone but through the device.
        cuda_graph.give_back_unused()
        decided_as = self.runtime.shape_of(key)
        decided, reserves = self._decided.get(decided_as), not len(self._captures)
        memory = Memory(self._memory_pool(), self._shared, needed, reserves=reserves)
        with state_kept(arguments.written_static(program, graph), graph):
            # Where the shape is known there is nothing to find out: the same kernels, read from other addresses.
            kept = capture_again(self.runtime, decided, arguments, memory) if decided is not None else None
            if kept is None:
                kept = self._search(key, graph, arguments, memory, alone=decided is not None)
        program, plan, captured = kept.runtime.program, kept.plan, kept.captured
        self._pool = captured.pool  # another than it was meant to be, where somebody invalidated the first attempt
        outputs = OutputSpec(program, plan.graph, captured.outputs or (), arguments.values)
        arguments.let_go()
        kind = _NamedCaptured if self.runtime.options.annotate else _Captured
        self._captures.add(key, kind(captured, arguments, outputs, self._loans, self.runtime.name))
        if decided is None:
            self._decided[decided_as] = kept.runtime, plan
        self._decided.move_to_end(decided_as)
        if len(self._decided) > DECISIONS_KEPT:
            self._decided.popitem(last=False)
        self.runtime.record.planned(key, plan, captured=True, rewrites=kept.runtime.generated.rewrites)

    def _search(self, key: Key, graph: KernelGraph, arguments: StaticArguments, memory: Memory, alone: bool) -> Kept:
        """The fastest lowering and schedule for shape `key`. alone: of the first lowering, as no other will do."""
        shape, record = self.runtime.shape_of(key), self.runtime.record
        record.remembered -= {shape, key}  # whatever an earlier search of it found
        kept = capture_fastest(self.runtime, graph, arguments, memory, shape, self._near, alone=alone)
        record.measured(key, kept.tried, kept.lowerings)
        if shape in record.remembered:
            record.remembered.add(key)
        return kept

    def _near(self, lowering: Runtime) -> Schedule | None:
        """What won with `lowering` for the shape decided last, if that was kept for one."""
        plans = (plan for kept, plan in reversed(self._decided.values()) if kept is lowering)
        return next((plan.schedule for plan in plans), None)

    def _memory_pool(self) -> Any:
        """One pool for all captures of this graph; a new one when none is left, for a pool ends with its last graph."""
        if not len(self._captures):
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def give_up_expired(self) -> None:
        """Give back the memory of graphs whose parameters are gone; of a lane at work, another time."""
        if self._process == os.getpid() and self._lock.acquire(blocking=False):
            try:
                self._captures.give_up_expired()
            finally:
                self._lock.release()

    def release(self) -> None:
        """Give back all captured graphs and their memory."""
        self._captures.clear()
