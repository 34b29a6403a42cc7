"""What the examples share: their arguments, a comparison with eager, and timing that takes turns."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from opara_backend.report.record import GraphRecord

# Largest relative distance (L2) from eager that counts as agreement; the GPU may use tf32, as eager may.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that every example takes."""
    found = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    found.add_argument("--small", action="store_true", help="a reduced model that compiles quickly on a CPU")
    found.add_argument("--calls", type=_positive, default=20, help="timed calls (default: %(default)s)")
    return found


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} given, a number of at least 1 accepted")
    return int(text)


def dtype_for(device: str) -> torch.dtype:
    """float16 on a GPU, float32 on a CPU."""
    return torch.float16 if torch.device(device).type == "cuda" else torch.float32


def check(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise if `found` is not what eager gives."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    if not error <= TOLERANCE[expected.dtype]:
        raise AssertionError(f"{what} disagrees with eager: relative error {error:.2e}")
    print(f"{what} agrees with eager: relative error {error:.1e}")


def report(variants: Mapping[str, Callable[[], object]], calls: int, device: str) -> None:
    """Print the median wall time per call of each variant; they take turns, so that clocks drift for all alike."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(calls):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    for name, found in times.items():
        print(f"{name}: {statistics.median(found) * 1e3:.3f} ms a call")


def synchronize(device: str) -> None:
    """Wait for the GPU, if it is one."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(call: Callable[[], object], device: str, calls: int = 3) -> None:
    """The first calls compile, measure and capture."""
    for _ in range(calls):
        call()
    synchronize(device)


def describe(records: Sequence[GraphRecord]) -> None:
    """Print how each graph runs, and every step down the ladder; on a GPU there should be none."""
    for record in records:
        for plan, captured in record.plans.values():
            how = "captured in one CUDA Graph" if captured else "run in order"
            print(f"{len(plan.graph)} kernels on {plan.schedule.streams} streams, {how}")
        for step in record.fallbacks:
            print("fallback:", step)
    if not any(record.plans for record in records):
        raise AssertionError("nothing was compiled by opara")
