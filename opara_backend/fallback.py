"""The ladder's steps down: why, what to do about it, and where it is counted.

Takes: a reason and a detail. Gives: one warning per step, a count in `torch._dynamo.utils.counters["opara"]`, or an
error where the user asked for one; and for a KernelGraph that needs the host, reason and detail of that.
Must not change: the result of the user's program.

The ladder: schedule and capture, with rewrites of the graph and without -> schedule without capture -> stock Inductor.
Nothing goes below that.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opara_backend.kernel_graph import KernelGraph

log = logging.getLogger(__name__)


class FallbackReason(enum.Enum):
    """Why a graph does not run as it was asked to. The value is the name users see and count."""

    TRAINING = "training"
    UNSUPPORTED_DEVICE = "unsupported_device"
    UNSUPPORTED_OPTION = "unsupported_option"
    UNSUPPORTED_LOWERING = "unsupported_lowering"
    REWRITE_FAILED = "rewrite_failed"
    HOST_KERNEL = "host_kernel"
    HOST_DECISION = "host_decision"
    CAPTURE_OFF = "capture_off"
    CAPTURE_LIMIT = "capture_limit"
    CAPTURE_FAILED = "capture_failed"
    OUT_OF_MEMORY = "out_of_memory"
    INVALID_SCHEDULE = "invalid_schedule"

    @property
    def remedy(self) -> str:
        """What the user can do about it."""
        return _REMEDIES[self]


_REMEDIES = {
    FallbackReason.TRAINING: "call the model under torch.no_grad() or torch.inference_mode() to schedule it",
    FallbackReason.UNSUPPORTED_DEVICE: "move the model to a CUDA device or the CPU",
    FallbackReason.UNSUPPORTED_OPTION: "leave that Inductor option at its default",
    FallbackReason.UNSUPPORTED_LOWERING: "nothing to do: stock Inductor runs it; please report the detail",
    FallbackReason.REWRITE_FAILED: "nothing to do: it is compiled without them; please report the detail",
    FallbackReason.HOST_KERNEL: "move the tensors named to the GPU, or pass Python numbers as tensors on the GPU",
    FallbackReason.HOST_DECISION: "keep .item(), data-dependent shapes and control flow out of the compiled region",
    FallbackReason.CAPTURE_OFF: 'remove options={"cuda_graph": False}',
    FallbackReason.CAPTURE_LIMIT: 'raise options={"max_captures": ...} or pad inputs to fewer shapes',
    FallbackReason.CAPTURE_FAILED: "see the exception above; the model runs uncaptured",
    FallbackReason.OUT_OF_MEMORY: "free GPU memory, or lower the batch size",
    FallbackReason.INVALID_SCHEDULE: "a bug in a policy: please report the detail; the model runs in program order",
}


@dataclass(frozen=True)
class Fallback:
    """One step down the ladder: `reason`, what exactly (`detail`), and the exception behind it, as text."""

    reason: FallbackReason
    detail: str = ""
    error: str = ""

    def __str__(self) -> str:
        text = f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value
        return f"{text} ({self.reason.remedy})"


def why_host(graph: KernelGraph) -> tuple[FallbackReason, str] | None:
    """Why no CUDA Graph can hold `graph`: the first place where it needs the host, with the user's line; else None."""
    if len(graph.segments) > 1:
        ran = graph.segments[1]
        if not graph.kernels:
            return FallbackReason.HOST_DECISION, "the host decides, and runs no kernel"
        kernel = graph.kernels[max(0, ran - 1)]
        seen = "after" if ran else "before the first kernel,"
        return FallbackReason.HOST_DECISION, f"the host decides {seen} {kernel.call}{_at(kernel.source)}"
    for kernel in graph.kernels:
        if kernel.host:
            return FallbackReason.HOST_KERNEL, f"{kernel.call} touches the CPU{_at(kernel.source)}"
    return None


def _at(source: str) -> str:
    return f" at {source}" if source else ""


_listeners: contextvars.ContextVar[tuple[list[Fallback], ...]] = contextvars.ContextVar("opara_fallbacks", default=())


@contextlib.contextmanager
def collect() -> Iterator[list[Fallback]]:
    """A list that fills with the steps down taken in this context while the block runs."""
    found: list[Fallback] = []
    token = _listeners.set((*_listeners.get(), found))
    try:
        yield found
    finally:
        _listeners.reset(token)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Tell no list of this context about steps down taken while the block runs."""
    token = _listeners.set(())
    try:
        yield
    finally:
        _listeners.reset(token)


class OparaFallbackError(RuntimeError):
    """Raised instead of stepping down, with `options={"fallback": "error"}`."""

    def __init__(self, fallback: Fallback) -> None:
        super().__init__(f"opara would fall back: {fallback}")
        self.fallback = fallback

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is made again from its message, where this one takes a Fallback: workers send theirs home.
        return type(self), (self.fallback,), self.__dict__


def step_down(
    reason: FallbackReason, detail: str = "", *, policy: str = "warn", error: BaseException | None = None
) -> Fallback:
    """Log and count one step down, or raise OparaFallbackError if `policy` is "error"."""
    from opara_backend import upstream

    fallback = Fallback(reason, detail, f"{type(error).__name__}: {error}" if error else "")
    for listener in _listeners.get():
        listener.append(fallback)
    if policy == "error":
        raise OparaFallbackError(fallback) from error
    upstream.counters["opara"][reason.value] += 1
    asked_for = reason is FallbackReason.CAPTURE_OFF
    level = logging.INFO if asked_for else logging.WARNING
    log.log(level, "opara falls back: %s", fallback, exc_info=error)
    return fallback
