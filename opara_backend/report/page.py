"""Report -> one self-contained HTML page: timelines to zoom into, tables beside them.

Takes: a Report. Gives: text. Must not change: the report. Nothing is loaded from anywhere when the page is opened:
style, script and data are inside. Templates are the files in `assets/`.
"""

from __future__ import annotations

import html
import importlib.resources
import json
import re
from dataclasses import asdict
from typing import Any

from opara_backend.report.model import GraphReport, KernelRow, Report, ShapeReport
from opara_backend.report.text import extent, plain, short_source
from opara_backend.report.timelines import overlap_fraction

_FEWEST_BLOCKS = 4
_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")


def page(report: Report) -> str:
    """The page as HTML."""
    title = f"{report.model} on {report.device}"
    # Inside <script> only this sequence ends the element.
    data = json.dumps(_data(report), separators=(",", ":")).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    parts = {
        "@title@": html.escape(f"opara: {title}"),
        "@style@": _asset("page.css"),
        "@text@": html.escape(plain(report, width=150, kernels=None)),
        "@data@": data,
        "@script@": _asset("page.js"),
    }
    # In one pass, so that a name in the data that looks like a placeholder stays as it is.
    return re.sub(r"@\w+@", lambda found: parts[found.group()], _asset("page.html"))


def _asset(name: str) -> str:
    return importlib.resources.files("opara_backend.report").joinpath("assets", name).read_text(encoding="utf-8")


def _data(report: Report) -> dict[str, Any]:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions)
    steps = [*report.fallbacks, *(step for graph in report.graphs for step in graph.fallbacks)]
    said = [f"Fallback, {step.reason}: {step.detail} ({step.remedy})." for step in steps]
    classes = dict(report.modules)
    shapes = [
        _shape(f"graph {number}, {shape.shape}", graph, shape, classes)
        for number, graph in enumerate(report.graphs)
        for shape in graph.shapes
    ]
    notes = [*report.notes, *dict.fromkeys(note for shape in report.shapes() for note in shape.notes)]
    return {
        "about": " ".join([versions + ".", *said, *(f"{note[:1].upper()}{note[1:]}." for note in notes)]),
        "shapes": shapes,
    }


def _shape(name: str, graph: GraphReport, shape: ShapeReport, classes: dict[str, str]) -> dict[str, Any]:
    depends = {after for _, after, _, _ in graph.edges}
    blocks = _blocks(shape, classes)
    paths = [path for path, _ in blocks]
    return {
        "name": name,
        "basis": shape.basis,
        "cards": _cards(graph, shape),
        "critical": shape.critical,
        "blocks": blocks,
        "kernels": [_kernel(i, row, i in depends, paths, classes) for i, row in enumerate(shape.kernels)],
        "waits": [
            {
                "kernel": wait.kernel,
                "awaited": wait.awaited,
                "why": ", ".join(f"{h.kind} {h.buffer}".strip() for h in wait.hazards),
            }
            for wait in shape.waits
        ],
        "candidates": [
            {**asdict(row), "predicted": _us(row.predicted), "measured": _us(row.measured)} for row in shape.candidates
        ],
        "timelines": [
            {
                "kind": line.kind,
                "title": line.title[:1].upper() + line.title[1:],
                "note": line.note,
                "makespan": line.makespan * 1e6,
                "ambiguous": line.ambiguous,
                "spans": [(s.kernel, s.stream, round(s.start * 1e6, 4), round(s.end * 1e6, 4)) for s in line.spans],
            }
            for line in sorted(shape.timelines, key=lambda t: ("measured", "plan", "sequential").index(t.kind))
        ],
    }


def _kernel(index: int, row: KernelRow, depends: bool, paths: list[str], classes: dict[str, str]) -> dict[str, Any]:
    own = [path for path in row.module.split(" + ") if path != "..."]
    return {
        "index": index,
        "label": row.label,
        "short": f"{_tail(own[-1])} {row.operation}" if row.module else row.operation,
        "module": row.module,
        "classes": " + ".join(_with_classes(path, classes) for path in own) if row.module else "",
        "blocks": [p for p in paths if any(m == p or m.startswith(p + ".") for m in own)],
        "call": row.call,
        "kind": row.kind,
        "source": row.source,
        "place": short_source(row.source),
        "stream": row.stream,
        "position": row.position,
        "us": row.seconds * 1e6,
        "host_us": _us(row.host_seconds),
        "memory_bound": row.memory_bound,
        "flops": row.flops,
        "nbytes": row.nbytes,
        "critical": row.critical,
        "depends": depends,
        "launches": [
            {**asdict(launch), "grid": extent(launch.grid), "block": extent(launch.block)} for launch in row.launches
        ],
    }


def _with_classes(path: str, classes: dict[str, str]) -> str:
    """`features.5 (Inception) > five.1 (ConvNorm) > conv (Conv2d)`: a path with the classes that say something."""
    parts, steps, since = path.split("."), list[str](), 0
    for end in range(1, len(parts) + 1):
        kind = classes.get(".".join(parts[:end]), "")
        if kind and kind not in _CONTAINERS:
            steps.append(f"{'.'.join(parts[since:end])} ({kind})")
            since = end
    return " > ".join([*steps, *([".".join(parts[since:])] if since < len(parts) else [])])


def _tail(path: str) -> str:
    """The last names of a path, for a label inside a bar."""
    parts = path.split(".")[-3:]
    while len(parts) > 1 and parts[0].isdigit():
        del parts[0]
    return ".".join(parts)


def _blocks(shape: ShapeReport, classes: dict[str, str]) -> list[tuple[str, str]]:
    """Parts of the model worth looking at: the shallowest level of modules with enough of them, in program order."""
    paths = [m.split(".") for row in shape.kernels if row.module for m in row.module.split(" + ") if m != "..."]
    found: dict[str, None] = {}
    for depth in range(1, 1 + max(map(len, paths), default=0)):
        found = {".".join(path[:depth]): None for path in paths}
        if len(found) >= _FEWEST_BLOCKS:
            break
    return [(path, f"{path} ({classes[path]})" if classes.get(path) else path) for path in sorted(found, key=_natural)]


def _natural(path: str) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


def _cards(graph: GraphReport, shape: ShapeReport) -> list[tuple[str, str]]:
    cards = [
        (f"{len(shape.kernels)} on {shape.streams}", f"kernels on streams, {len(shape.waits)} waits; {shape.state}")
    ]
    bound, row = shape.bound, shape.timeline("sequential")
    if bound is not None:
        taken, how = (bound.measured, "measured") if bound.measured is not None else (bound.predicted, "predicted")
        if taken is not None:
            cards.append((_short(taken), f"one call, {how}; {shape.policy}"))
        alone = next((c.measured for c in shape.candidates if c.streams == 1 and c.measured is not None), None)
        alone, how = (alone, "measured") if alone is not None else (row.makespan if row else None, "predicted")
        if alone is not None:
            cards.append((_short(alone), f"the same kernels on one stream, {how}"))
        at_best = max(bound.critical_path, bound.work)
        cards.append((_short(at_best), f"no schedule beats this: {bound.dominant}"))
        if bound.gap is not None:
            cards.append((f"{bound.gap:.0%}", "above that is what a call takes"))
        if bound.streams is not None and bound.launch is not None and bound.contention is not None:
            rest = f"{_short(bound.launch)} launches and joins, {_short(bound.streams)} kernels in turn on a stream"
            cards.append((_short(bound.contention), f"of a call is contention; {rest}"))
    for timed in shape.lowerings:
        kept = ", kept" if timed.chosen else ""
        cards.append((_short(timed.measured), f"a call of the lowering with {timed.label}, measured{kept}"))
    for line in shape.timelines:
        if line.kind == "measured" or (line.kind == "plan" and shape.timeline("measured") is None):
            how = "measured" if line.kind == "measured" else "predicted"
            cards.append((f"{overlap_fraction(line):.0%}", f"of the time several kernels run, {how}"))
    if shape.memory is not None:
        cards.append((f"{shape.memory.arena_bytes / 2**20:.1f} MiB", f"arena; sharing saves {shape.memory.reuse:.0%}"))
        if shape.memory.libraries:
            reserved = f"{sum(shape.memory.libraries) / 2**20:.0f} MiB"
            cards.append((reserved, "reserved for workspaces and results of libraries"))
    if graph.replays:
        cards.append((f"{graph.hit_rate:.0%}", "of the calls were replays"))
    return cards


def _us(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def _short(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} us"
