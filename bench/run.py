"""Measure models under several backends in one process and write the samples down.

Takes: names of models, backends, dtypes, batch sizes. Gives: a JSON document (schema `SCHEMA`) with every sample,
what it was measured on, and whether outputs agreed with eager; a table for people.
Must not change: the models. A figure whose correctness check failed is not reported.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import documents, models, recorded
from bench.timing import Samples, measure
from opara_backend.kernel_graph import KernelGraph
from opara_backend.report.record import GraphRecord, collect

SCHEMA = 1
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # tf32 convolutions are allowed in fp32


@dataclass(frozen=True)
class Row:
    """One variant of one case. error: relative L2 distance from eager; captured: shapes captured / graphs."""

    model: str
    dtype: str
    batch: int
    backend: str
    samples: Samples
    error: float
    first_call_seconds: float
    kernels: int
    streams: int
    captured: int
    fallbacks: tuple[str, ...]


def compiled(model: nn.Module, backend: str) -> Callable[..., Any]:
    """`model` under `backend`: eager, inductor, reduce-overhead, max-autotune, opara, or opara:KEY=VALUE,..."""
    name, _, rest = backend.partition(":")
    if name == "eager":
        return model
    if name == "inductor":
        return torch.compile(model)
    if name in ("reduce-overhead", "max-autotune"):
        return torch.compile(model, mode=name)
    if name == "opara":
        options = dict(pair.split("=") for pair in rest.split(",") if pair)
        typed: dict[str, Any] = {k: int(v) if v.isdigit() else v for k, v in options.items()}
        return torch.compile(model, backend="opara", options=typed or None)
    raise ValueError(f"unknown backend {backend!r}; accepted: eager, inductor, reduce-overhead, max-autotune, opara")


def run_case(
    name: str,
    dtype: torch.dtype,
    batch: int,
    backends: Sequence[str],
    rounds: int,
    small: bool,
    record: Callable[[GraphRecord], None] | None = None,
) -> list[Row]:
    """Measure one model at one dtype and batch size under all `backends`, interleaved.

    record: called with what the last backend made of the model.
    """
    entry = models.get(name).reduced() if small else models.get(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = entry.build().to(device, dtype).eval()
    inputs = tuple(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in entry.inputs(batch))
    variants: dict[str, Callable[[], object]] = {}
    facts: dict[str, tuple[float, float, list[GraphRecord]]] = {}
    with torch.inference_mode():
        reference = _flat(model(*inputs))
        for backend in backends:
            torch._dynamo.reset()
            call = compiled(model, backend)
            with collect() as records:
                start = time.perf_counter()
                call(*inputs)
                _synchronize(device)
                first = time.perf_counter() - start
                for _ in range(4):  # reduce-overhead records in its second call
                    found = _flat(call(*inputs))
            error = _distance(found, reference)
            if not error <= TOLERANCE[dtype]:
                raise RuntimeError(f"{name} {dtype} batch {batch} under {backend}: error {error:.2e} against eager")
            facts[backend] = (error, first, records)
            variants[backend] = _bound(call, inputs)
        samples = measure(variants, rounds=rounds, device=device)
    if record is not None:
        for graph in facts[backends[-1]][2]:
            record(graph)
    return [_row(name, dtype, batch, b, samples[b], *facts[b]) for b in backends]


def _bound(call: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    return lambda: call(*inputs)


def _row(
    name: str, dtype: torch.dtype, batch: int, backend: str, samples: Samples, error: float, first: float, records: Any
) -> Row:
    plans = [plan for record in records for plan in record.plans.values()]
    return Row(
        model=name,
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        backend=backend,
        samples=samples,
        error=error,
        first_call_seconds=first,
        kernels=sum(len(plan.graph) for plan, _ in plans),
        streams=max((plan.schedule.streams for plan, _ in plans), default=0),
        captured=sum(captured for _, captured in plans),
        fallbacks=tuple(str(f) for record in records for f in record.fallbacks),
    )


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.detach().double().clone()]
    parts = value.values() if isinstance(value, dict) else value
    return [t for part in parts for t in _flat(part)]


def _distance(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    return max(float((f - r).norm() / r.norm().clamp_min(1e-30)) for f, r in zip(found, reference, strict=True))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def command(arguments: Sequence[str]) -> str:
    """The command line that measures the same again; where results are put is nobody else's business."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument not in ("--out", "--record", "--commit"):
            kept.append(argument)
        skip = argument in ("--out", "--record", "--commit")
    return " ".join(["python -m bench", *kept])


def environment(commit: str | None) -> dict[str, Any]:
    """What figures depend on: device, driver, versions, commit, command."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or _output("git", "rev-parse", "HEAD"),
        "command": command(sys.argv[1:]),
    }


def document(rows: Sequence[Row], commit: str | None) -> dict[str, Any]:
    """The JSON document for `rows`."""
    return {"schema": SCHEMA, **environment(commit), "rows": [asdict(row) for row in rows]}


def _output(*command: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    return None


def run(
    names: Sequence[str],
    dtypes: Sequence[str],
    batches: Sequence[int],
    backends: Sequence[str],
    *,
    rounds: int,
    small: bool,
    record_to: Path | None = None,
    commit: str | None = None,
) -> Iterator[list[Row]]:
    """The rows of each case in turn. record_to: folder for the kernel graphs the last backend made."""
    for name in names:
        for dtype in dtypes:
            for batch in batches:
                about = {"model": name, "dtype": dtype, "batch": batch, **environment(commit)}
                record = functools.partial(_save_graph, about, record_to) if record_to is not None else None
                yield run_case(name, getattr(torch, dtype), batch, backends, rounds, small, record)


def _save_graph(about: dict[str, Any], folder: Path, record: GraphRecord) -> None:
    for key, (plan, _) in record.plans.items():
        tried = tuple(recorded.Measured(schedule, seconds) for schedule, seconds in record.candidates.get(key, ()))
        recorded.save(recorded.Recording(about, _portable(plan.graph), plan.profile, tried), folder)


def _portable(graph: KernelGraph) -> KernelGraph:
    """The graph with source files named from this project's root on: where it lay is nobody else's business."""
    root = f"{Path(__file__).parent.parent}/"
    return replace(graph, kernels=tuple(replace(k, source=k.source.removeprefix(root)) for k in graph.kernels))


def save(path: str, rows: Sequence[Row], commit: str | None) -> None:
    """Write the document for `rows` to `path`."""
    documents.write(Path(path), document(rows, commit))
