"""The main job, end to end: classify a photograph with GoogLeNet, compiled by this backend.

Takes: a device ("cuda" or "cpu"), an element type, a number of timed calls. Gives: a table on standard output and
whether the result agrees with eager. Must not change: anything. Weights are seeded, so the class means nothing; the
agreement and the times do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table

from opara_backend.demo.googlenet import googlenet
from opara_backend.demo.photograph import photograph
from opara_backend.report.record import GraphRecord, collect

# Largest relative distance (L2) from eager that still counts as agreement. Both compilers run the same kernels, whose
# rounding differs from eager's; convolutions may use tf32 on the GPU, as they may in eager.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def run(device: torch.device, dtype: torch.dtype, calls: int) -> bool:
    """Run the demo; True if it agrees with eager."""
    console = Console()
    model = googlenet(seed=0).to(device, dtype)
    image = photograph().to(device, dtype)
    stock = "reduce-overhead" if device.type == "cuda" else "default"
    with torch.inference_mode(), collect() as records:
        expected = model(image).double()
        ours = torch.compile(model, backend="opara")
        plain = torch.compile(model, mode=stock)
        with console.status("compiling with opara and with plain Inductor"):
            for _ in range(3):
                found = ours(image).double()
                plain(image)
        error = float((found - expected).norm() / expected.norm())
        largest = float((found - expected).abs().max())
        seconds = _interleaved({"opara": lambda: ours(image), "plain": lambda: plain(image)}, calls, device)
    agrees = error <= TOLERANCE[dtype]
    console.print(_table(device, dtype, stock, records, (largest, error), seconds, int(found.argmax())))
    if not agrees:
        console.print(f"[red]disagrees with eager: relative error {error:.2e}, accepted {TOLERANCE[dtype]:.0e}[/red]")
    return agrees


def _interleaved(variants: Mapping[str, Callable[[], object]], calls: int, device: torch.device) -> dict[str, float]:
    """Median synchronised wall time (seconds) per call, the variants taking turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(calls):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def _table(
    device: torch.device,
    dtype: torch.dtype,
    stock: str,
    records: list[GraphRecord],
    errors: tuple[float, float],
    seconds: Mapping[str, float],
    winner: int,
) -> Table:
    table = Table(title="GoogLeNet, 224 x 224 photograph, batch 1", show_header=False)
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (no streams: the schedule runs in order)"
    )
    table.add_row("device", f"{name}, {str(dtype).removeprefix('torch.')}")
    for record in records:
        for plan, captured in record.plans.values():
            how = "captured in one CUDA Graph" if captured else "run in launch order"
            table.add_row("kernels", f"{len(plan.graph)}, {how}")
            table.add_row("streams", str(plan.schedule.streams))
            table.add_row("waits", str(plan.schedule.wait_count))
            table.add_row("checked", f"schedule and memory, in {plan.verify_seconds * 1e3:.1f} ms")
            table.add_row("policy", f"{plan.schedule.policy} (streams/launch order)")
            table.add_row(
                "memory",
                f"{plan.memory.arena_bytes / 2**20:.1f} MiB in place of {plan.memory.requested_bytes / 2**20:.1f} MiB",
            )
        for step in record.fallbacks:
            table.add_row("fallback", str(step))
    table.add_row("class", str(winner))
    table.add_row("error against eager", f"{errors[0]:.2e} at most, {errors[1]:.2e} relative")
    table.add_row("time per call, opara", f"{seconds['opara'] * 1e3:.3f} ms")
    label = "plain Inductor" if stock == "default" else f"plain Inductor, {stock}"
    compared = f"opara is {seconds['plain'] / seconds['opara']:.2f}x as fast"
    if device.type != "cuda":
        compared = "both run in order here: any difference is noise"
    table.add_row(f"time per call, {label}", f"{seconds['plain'] * 1e3:.3f} ms ({compared})")
    return table
