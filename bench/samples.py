"""What one variant of one case gave in one process, and the JSON document that keeps such rows.

Takes: rows, or a file of this schema or the one before. Gives: the document; rows. Imports no torch.
Must not change: a file but the one written. Errors: ValueError naming the file, the row and the field.

Schema 2. The document says device, driver, versions, commit and command; a row is one variant of one case in one
process, with every sample (seconds a call, one a round). Schema 1 had one process and fewer figures.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bench import documents

SCHEMA, OLDER = 2, 1
STOCK, OURS = "reduce-overhead", "opara"
LEAN = "opara:extra_memory=0"  # no schedule that takes much more memory than one stream
MIB = 2**20
ABOUT = ("device", "driver", "torch", "cuda", "python", "commit", "command")

Case = tuple[str, str, int]  # model, dtype, batch


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one entry a round. gpu: None without a GPU. wall: synchronised after each call, median."""

    gpu: tuple[float, ...] | None
    wall: tuple[float, ...]
    wall_p90: tuple[float, ...]

    @property
    def best_clock(self) -> tuple[float, ...]:
        """GPU time where there is one, else wall time."""
        return self.gpu if self.gpu is not None else self.wall


@dataclass(frozen=True)
class Row:
    """One variant of one case in one process.

    samples: None if it could not be reported, for which `problem` says why. error: relative L2 distance from eager.
    first_call_seconds: the first call in this process, whatever the caches held; None if it shared the machine with
    others. cold_seconds, warm_seconds: the first call of a fresh process, caches empty, and filled; None where nobody
    measured. search_seconds: profiling, scheduling, planning, capturing and timing candidates, part of the first calls,
    always alone on the GPU, None where nothing was searched; profile_seconds: its first part. peak_bytes: reserved on
    the GPU at most, beyond what was before (the model, its inputs, variants compiled earlier); held_bytes: likewise,
    once it is warm and what can be given back is; model_bytes: parameters, buffers and inputs.
    replays: CUDA Graphs one call replays, None on a CPU. captured: shapes captured, of `graphs` compiled graphs, as
    this backend reports them; fallbacks: its reasons, or stock Inductor's. kinds: kernels by kind. arena_bytes: what
    the memory plan takes; bound_seconds: what no schedule of these kernels can beat; path_seconds: their
    critical path, streams_seconds and launch_seconds: what the schedule adds to it (`scheduling.gaps`); the rest of the
    time is contention. rewrites: those in the kernels it runs by; lowerings: of each way to lower the graph that was
    timed against the others, its rewrites and seconds a replay, the one without first; empty where there was no choice.
    """

    model: str
    dtype: str
    batch: int
    backend: str
    samples: Samples | None
    error: float | None
    first_call_seconds: float | None
    kernels: int = 0
    streams: int = 0
    captured: int = 0
    fallbacks: tuple[str, ...] = ()
    process: int = 0
    problem: str | None = None
    cold_seconds: float | None = None
    warm_seconds: float | None = None
    search_seconds: float | None = None
    profile_seconds: float | None = None
    peak_bytes: int | None = None
    replays: int | None = None
    graphs: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    policy: str = ""
    waits: int = 0
    arena_bytes: int = 0
    bound_seconds: float | None = None
    held_bytes: int | None = None
    path_seconds: float | None = None
    streams_seconds: float | None = None
    launch_seconds: float | None = None
    model_bytes: int | None = None
    rewrites: tuple[str, ...] = ()
    lowerings: tuple[tuple[tuple[str, ...], float], ...] = ()

    @property
    def case(self) -> Case:
        """Model, dtype and batch."""
        return (self.model, self.dtype, self.batch)


@dataclass(frozen=True)
class Results:
    """A document: what it was measured on (`ABOUT`), and its rows."""

    about: Mapping[str, Any]
    rows: tuple[Row, ...]

    def cases(self) -> tuple[Case, ...]:
        """Every case, in order."""
        return tuple(dict.fromkeys(row.case for row in self.rows))

    def of(self, case: Case, backend: str) -> tuple[Row, ...]:
        """The reported rows of one variant, one a process."""
        return tuple(r for r in self.rows if r.case == case and r.backend == backend and r.samples is not None)

    def both(self, first: str = STOCK, second: str = OURS) -> Iterator[tuple[Case, tuple[Row, ...], tuple[Row, ...]]]:
        """Every case that both variants were reported for, with the rows of each."""
        for case in self.cases():
            rows = self.of(case, first), self.of(case, second)
            if all(rows):
                yield case, *rows


def median(rows: Iterable[Row], clock: str = "best_clock") -> float:
    """Seconds per call: the median over processes of each one's median over rounds."""
    return statistics.median(statistics.median(getattr(row.samples, clock)) for row in rows)


def spread(rows: Iterable[Row], clock: str = "best_clock") -> float:
    """How far the processes' medians lie apart, as a fraction of the smallest; 0 for one process."""
    middles = [statistics.median(getattr(row.samples, clock)) for row in rows]
    return max(middles) / min(middles) - 1


def load(path: Path) -> Results:
    """The results at `path`, of this schema or the one before; ValueError if they are neither."""
    document = documents.read(path, SCHEMA, OLDER)
    missing = [name for name in (*ABOUT, "rows") if name not in document]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    rows = tuple(_row(path, place, data) for place, data in enumerate(document["rows"]))
    return Results({name: document[name] for name in ABOUT}, rows)


def loaded(paths: Sequence[Path], say: Callable[[str], object]) -> list[Results] | None:
    """The results at `paths`, or where none is named every committed `h200*.json`; None if one cannot be read."""
    try:
        return [load(path) for path in paths or sorted(documents.RESULTS.glob("h200*.json"))]
    except (OSError, ValueError) as error:
        say(str(error))
        return None


def save(path: Path, results: Results) -> None:
    """Write `results` in this schema."""
    rows = [asdict(row) for row in results.rows]
    documents.write(path, {"schema": SCHEMA, **results.about, "rows": rows})


def row_from(data: Mapping[str, Any]) -> Row:
    """A row from its JSON form; ValueError naming the field that is missing, unknown or of a wrong type."""
    known = {f.name: f for f in fields(Row)}
    unknown = sorted(set(data) - set(known))
    needed = [n for n in ("model", "dtype", "batch", "backend", "samples") if n not in data]
    if unknown or needed:
        raise ValueError(f"unknown fields {unknown}, missing fields {needed}")
    for name, accepts in (("model", str), ("dtype", str), ("batch", int), ("backend", str), ("process", int)):
        if name in data and not isinstance(data[name], accepts):
            raise ValueError(f"field {name!r} takes a {accepts.__name__}, got {data[name]!r}")
    given = {"error": None, "first_call_seconds": None, **data, "samples": _samples(data["samples"])}
    words = {name: tuple(data.get(name, ())) for name in ("fallbacks", "rewrites")}
    lowerings = tuple((tuple(rewrites), seconds) for rewrites, seconds in data.get("lowerings", ()))
    return Row(**{**given, **words, "lowerings": lowerings})


def _row(path: Path, place: int, data: Any) -> Row:
    try:
        row = row_from(data)
        if row.samples is None and not row.problem:
            raise ValueError("a row without samples must say its problem")
        return row
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, row {place}: {error}") from error


def _samples(data: Any) -> Samples | None:
    if data is None:
        return None
    gpu = data.get("gpu")
    return Samples(
        None if gpu is None else _seconds("gpu", gpu),
        _seconds("wall", data.get("wall")),
        _seconds("wall_p90", data.get("wall_p90")),
    )


def _seconds(name: str, values: Sequence[Any] | None) -> tuple[float, ...]:
    if not values or not all(isinstance(v, (int, float)) and v > 0 for v in values):
        raise ValueError(f"samples.{name} takes seconds, at least one, each above zero; got {values!r}")
    return tuple(values)


def dumps(row: Row) -> str:
    """One row as one line."""
    return json.dumps(asdict(row))
