"""Measure one case, one model at one dtype and batch, under several backends interleaved in this process.

Takes: a `Job`. Gives: one `samples.Row` per backend, whose samples are left out where the outputs do not agree with
eager, nor come as close to double precision, or something failed: then the row says why. Must not change: the models.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import gate, models, observe, recorded
from bench.planted import slowed
from bench.samples import Case, Row, Samples
from bench.timing import measure
from bench.variants import Variant, variant
from opara_backend.kernel_graph import KernelGraph
from opara_backend.report.record import GraphRecord, collect

# Relative L2 distance from eager that is still agreement; tf32 convolutions are allowed in fp32.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
CALLS = 5  # before anything is timed: reduce-overhead records in its second call


@dataclass(frozen=True)
class Job:
    """One case to measure. process: number of the process; caches: folder of compiled code, None for Inductor's own.

    record_to: folder for the kernel graphs that the last backend makes. planted: by which share every backend but the
    first is slowed down, to see whether that is found.
    """

    model: str
    dtype: str
    batch: int
    backends: tuple[str, ...]
    rounds: int = 7
    small: bool = False
    process: int = 0
    caches: str | None = None
    record_to: str | None = None
    planted: float = 0.0

    @property
    def case(self) -> Case:
        """Model, dtype and batch."""
        return (self.model, self.dtype, self.batch)


@dataclass(frozen=True)
class Ready:
    """A variant that agrees with eager and may be timed."""

    call: Callable[[], object]
    row: Row
    records: tuple[GraphRecord, ...]


def run_job(job: Job, about: dict[str, Any] | None = None) -> list[Row]:
    """Measure `job`. about: what recorded kernel graphs say of themselves beside the case."""
    model, inputs, device = prepare(job)
    with torch.inference_mode(), _side_by_side():
        eager = _flat(model(*inputs))
        prepared = [_prepare_variant(job, variant(b), model, inputs, lambda: eager, device) for b in job.backends]
        ready = {p.row.backend: p for p in prepared if isinstance(p, Ready)}
        compiled = _frames()
        with gate.alone():
            calls = {name: r.call for name, r in ready.items()}
            if job.planted:
                slower = set(job.backends[1:])
                calls = {n: slowed(call, job.planted, device) if n in slower else call for n, call in calls.items()}
            timed = measure(calls, rounds=job.rounds, device=device)
            if _frames() != compiled:
                raise RuntimeError(f"{' '.join(map(str, job.case))}: something was compiled again while it was timed")
            rows = [
                replace(p.row, samples=_samples(p.row.backend, timed), replays=observe.replays(p.call))
                if isinstance(p, Ready)
                else p
                for p in prepared
            ]
    last = prepared[-1]
    if job.record_to is not None and isinstance(last, Ready):
        for graph in last.records:
            _save_graph({"model": job.model, "dtype": job.dtype, "batch": job.batch, **(about or {})}, job, graph)
    return rows


def _samples(backend: str, timed: Mapping[str, Samples]) -> Samples:
    """What was timed; Dynamo alone has nothing to do for a GPU."""
    return timed[backend] if variant(backend).kind != "dynamo" else replace(timed[backend], gpu=None)


@contextlib.contextmanager
def _side_by_side() -> Iterator[None]:
    """Let every variant keep its compiled code until all are timed: they share the model's, one entry each."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        try:
            yield
        finally:
            torch._dynamo.reset()


def _frames() -> int:
    """Frames compiled so far."""
    return int(torch._dynamo.utils.counters["frames"]["total"])


def prepare(job: Job) -> tuple[nn.Module, tuple[torch.Tensor, ...], torch.device]:
    """The model and its inputs on the device."""
    entry = models.get(job.model).reduced() if job.small else models.get(job.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, job.dtype)
    model = entry.build().to(device, dtype).eval()
    inputs = tuple(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in entry.inputs(job.batch))
    return model, inputs, device


def _prepare_variant(
    job: Job,
    chosen: Variant,
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    reference: Callable[[], list[torch.Tensor]],
    device: torch.device,
    *,
    remember: bool = False,
) -> Ready | Row:
    """Compile, warm up and check one variant; its row with the problem if it fails.

    reference: what eager computes, asked for after the first call.
    """
    row = Row(*job.case, chosen.name, None, None, None, process=job.process)
    if chosen.needs_gpu and device.type != "cuda":
        return replace(row, problem="needs a GPU")
    try:
        with caches(job, chosen):
            call = functools.partial(chosen.compile(model, remember=remember), *inputs)
            return _warm(job, chosen, row, model, inputs, call, reference, device)
    except Exception as error:  # one variant that fails must not cost the others' figures
        text = str(error).strip().splitlines() or [""]
        return replace(row, problem=f"{type(error).__name__}: {text[0][:200]}")


def _warm(
    job: Job,
    chosen: Variant,
    row: Row,
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    call: Callable[[], Any],
    reference: Callable[[], list[torch.Tensor]],
    device: torch.device,
) -> Ready | Row:
    torch._dynamo.utils.counters.clear()
    reserved = _reserved(device, new_peak=True)
    with collect() as records, gate.searching_alone():
        start = time.perf_counter()
        call()
        _synchronize(device)
        first = time.perf_counter() - start
        for _ in range(CALLS - 1):
            found = _flat(call())
            _synchronize(device)  # a process that is stopped here has little queued
    eager = reference()
    error = distance(found, eager)
    limit = TOLERANCE[getattr(torch, job.dtype)]
    agrees = error <= limit  # NaN is no agreement either
    if not agrees:
        agrees = _as_close_as_eager(found, eager, model, inputs, limit)
    seen = observe.facts(records)
    fallbacks = seen.fallbacks or observe.stock_reasons(torch._dynamo.utils.counters)
    row = replace(
        row,
        error=error,
        first_call_seconds=first,
        peak_bytes=None if reserved is None else torch.cuda.max_memory_reserved() - reserved,
        held_bytes=None if reserved is None else (_reserved(device) or 0) - reserved,
        model_bytes=sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers(), *inputs)),
        **{**vars(seen), "fallbacks": fallbacks},
    )
    if not agrees:
        return replace(row, problem=f"wrong: error {error:.2e} against eager, {limit:.0e} allowed")
    if chosen.unfused and set(seen.kinds) - {"extern", "glue"}:
        return replace(row, problem=f"not unfused: {seen.kinds}")
    return Ready(call, row, tuple(records))


@contextlib.contextmanager
def caches(job: Job, chosen: Variant) -> Iterator[None]:
    """Keep compiled code for this case in a folder of its own while the block runs, if the job says so.

    Stock Inductor and this backend share one: kernels they have in common are tuned once, and the same for both.
    """
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    if job.caches is None or not chosen.compiles:
        yield
        return
    folder = Path(job.caches) / f"{job.model}-{job.dtype}-{job.batch}{chosen.settings}"
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({names[0]: str(folder), names[1]: str(folder / "triton")})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _as_close_as_eager(
    found: Sequence[torch.Tensor],
    eager: Sequence[torch.Tensor],
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    limit: float,
) -> bool:
    """True if `found` is as close to the same model in double precision as eager is, within `limit`.

    What remains of a sum whose parts cancel (a score near zero) is mostly rounding, eager's own too.
    """
    exact = _flat(copy.deepcopy(model).double()(*(x.double() if x.is_floating_point() else x for x in inputs)))
    return distance(found, exact) <= distance(eager, exact) + limit


def distance(found: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """The largest relative L2 distance between outputs; infinity where shapes differ."""
    if [f.shape for f in found] != [r.shape for r in reference]:
        return float("inf")
    return max(float((f - r).norm() / r.norm().clamp_min(1e-30)) for f, r in zip(found, reference, strict=True))


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.detach().double().clone()]
    parts = value.values() if isinstance(value, dict) else value
    return [t for part in parts for t in _flat(part)]


def _reserved(device: torch.device, *, new_peak: bool = False) -> int | None:
    """Bytes the caching allocator holds after giving back what it can; None on a CPU.

    cuBLAS's workspaces of eager calls are among it: they would be missing from what the first backend holds that
    forgets them.
    """
    if device.type != "cuda":
        return None
    from opara_backend import upstream

    gc.collect()
    torch.cuda.synchronize()
    upstream.clear_cublas_workspaces()
    torch.cuda.empty_cache()
    if new_peak:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _save_graph(about: dict[str, Any], job: Job, record: GraphRecord) -> None:
    for key, (plan, _) in record.plans.items():
        tried = tuple(recorded.Measured(schedule, seconds) for schedule, seconds in record.candidates.get(key, ()))
        recording = recorded.Recording(about, _portable(plan.graph), plan.profile, tried)
        recorded.save(recording, Path(job.record_to or "."))


def _portable(graph: KernelGraph) -> KernelGraph:
    """The graph with source files named from this project's root on: where it lay is nobody else's business."""
    root = f"{Path(__file__).parent.parent}/"
    return replace(graph, kernels=tuple(replace(k, source=k.source.removeprefix(root)) for k in graph.kernels))


def first_call(job: Job) -> Row:
    """The first call of a fresh process under the job's only backend, in `first_call_seconds`; nothing is timed.

    What every backend pays once a process is paid before: importing Inductor and starting its workers, loading CUDA's
    libraries. Eager computes after it: what libraries choose for each shape, a backend's first call pays for.
    """
    model, inputs, device = prepare(job)
    torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    some = torch.zeros(1, 1, 8, 8, device=device, dtype=getattr(torch, job.dtype))
    _ = torch.nn.functional.conv2d(some, some[..., :3, :3]) @ some[..., :6, :6]
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    lock = Path(job.caches) / f"tuning-{gpu}.lock" if job.caches else None
    with torch.inference_mode(), _side_by_side(), gate.tuning_alone(lock):
        chosen = variant(job.backends[0])
        made = _prepare_variant(job, chosen, model, inputs, lambda: _flat(model(*inputs)), device, remember=True)
    return made.row if isinstance(made, Ready) else made


def as_dict(job: Job) -> dict[str, Any]:
    """The JSON form of a job."""
    return asdict(job)


def seconds_of(rows: Sequence[Row]) -> float | None:
    """Median of the first calls of `rows`; None where there is none."""
    found = [row.first_call_seconds for row in rows if row.first_call_seconds is not None and row.problem is None]
    return statistics.median(found) if found else None
