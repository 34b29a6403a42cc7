"""Report -> tables for a terminal, and for a notebook.

Takes: a Report. Gives: text or HTML. Must not change: the report. Needs rich.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from opara_backend.report.model import GraphReport, KernelRow, Report, ShapeReport, WaitRow
from opara_backend.report.timelines import overlap_fraction, overlaps

SHOWN = 25  # kernels in str(report)
_NARROWEST = 60
_COLUMNS = (
    *("", "kernel", "source", "stream", "us", "grid/block"),
    *("regs", "shared", "blocks/SM", "waves", "GPU", "bound"),
)
_WIDE, _WIDE_ONLY = 112, ("regs", "shared", "blocks/SM", "waves", "bound")


def plain(report: Report, *, width: int | None = None, kernels: int | None = SHOWN) -> str:
    """The report as text, as wide as the terminal unless told otherwise."""
    columns = width or max(_NARROWEST, min(180, shutil.get_terminal_size((120, 24)).columns))
    console = Console(file=io.StringIO(), width=columns, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(rendered(report, kernels, columns))
    text: str = console.file.getvalue()
    return "\n".join(line.rstrip() for line in text.splitlines())


def html(report: Report) -> str:
    """The report as HTML, for `_repr_html_`."""
    console = Console(file=io.StringIO(), width=120, record=True, force_jupyter=False)
    console.print(rendered(report, SHOWN))
    pre = '<pre style="font-family:monospace;line-height:1.2">{code}</pre>'
    found: str = console.export_html(code_format=pre, inline_styles=True)
    return found


def rendered(report: Report, kernels: int | None = SHOWN, width: int = 120) -> RenderableType:
    """The report for any rich console; at most `kernels` kernels a shape are listed."""
    return Group(*_parts(report, kernels, width))


def _parts(report: Report, kernels: int | None, width: int) -> Iterator[RenderableType]:
    top = _pairs(f"opara: {report.model}")
    _add(top, "device", report.device)
    _add(top, "versions", ", ".join(f"{name} {version}" for name, version in report.versions))
    if report.options:
        _add(top, "options", ", ".join(f"{key}={value}" for key, value in report.options))
    _add(top, "graphs", str(len(report.graphs)))
    for step in report.fallbacks:
        _add(top, "fallback", f"{step.reason}: {step.detail} ({step.remedy})")
    for note in report.notes:
        _add(top, "note", note)
    yield top
    for number, graph in enumerate(report.graphs):
        yield _graph(number, graph)
        for shape in graph.shapes:
            yield from _shape(number, shape, kernels, width)


def _pairs(title: str) -> Table:
    """A table of names and sentences."""
    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    """A row of plain text: names of a user's may hold what rich takes for markup."""
    table.add_row(*map(Text, cells))


def _graph(number: int, graph: GraphReport) -> Table:
    table = _pairs(f"graph {number}")
    count = len(graph.shapes[0].kernels) if graph.shapes else 0
    parts = f" in {len(graph.segments)} segments" if len(graph.segments) > 1 else ""
    symbols = f", dynamic sizes {', '.join(graph.symbols)}" if graph.symbols else ""
    _add(table, "kernels", f"{count}{parts}{symbols}")
    if graph.rewrites:
        _add(table, "rewritten by", ", ".join(graph.rewrites))
    calls = graph.replays + graph.other_calls
    if calls:
        _add(table, "calls", f"{calls}, {graph.hit_rate:.0%} of them replayed")
    spent = [(name, getattr(graph.stages, name)) for name in graph.stages.__dataclass_fields__]
    _add(table, "time spent", ", ".join(f"{n.replace('_', ' ')} {_spent(s)}" for n, s in spent if s))
    for step in graph.fallbacks:
        where = f" [{step.source}]" if step.source and step.source not in step.detail else ""
        _add(table, "fallback", f"{step.reason}: {step.detail}{where} ({step.remedy})")
    return table


def _shape(number: int, shape: ShapeReport, kernels: int | None, width: int) -> Iterator[RenderableType]:
    table = _pairs(f"graph {number}, shape {shape.shape}")
    waits = f", {_count(len(shape.waits), 'wait')}" if shape.state != "unplanned" else ""
    _add(table, "runs", f"{shape.state}; {shape.policy} on {_count(shape.streams, 'stream')}{waits}")
    _add(table, "durations", shape.basis)
    for line in summary(shape):
        _add(table, *line)
    if shape.lowerings:
        timed = (f"{row.label} {us(row.measured)}{' (kept)' if row.chosen else ''}" for row in shape.lowerings)
        _add(table, "lowerings timed", "; ".join(timed))
    yield table
    if len(shape.candidates) > 1:
        yield _candidates(shape)
    yield _kernels(shape, kernels, width)
    if shape.waits:
        yield _waits(shape, kernels, width)


def summary(shape: ShapeReport) -> Iterator[tuple[str, str]]:
    """Bounds, overlap, memory and the critical path, as (name, sentence)."""
    bound, memory = shape.bound, shape.memory
    if bound is not None:
        times = [f"measured {us(bound.measured)}"] if bound.measured is not None else []
        times += [f"predicted {us(bound.predicted)}"] if bound.predicted is not None else []
        row = shape.timeline("sequential")
        times += [f"one stream, predicted {us(row.makespan)}"] if row is not None else []
        if times:
            yield "one call", ", ".join(times)
        gap = f"; the call lies {bound.gap:.0%} above it" if bound.gap is not None else ""
        yield (
            "no schedule beats",
            f"{us(max(bound.critical_path, bound.work))}, by {bound.dominant} "
            f"(critical path {us(bound.critical_path)}, work {us(bound.work)}){gap}",
        )
        if bound.streams is not None:
            yield (
                "above the critical path",
                f"{us(bound.streams)} kernels in turn on a stream, {us(bound.launch)} launches and joins, "
                f"{us(bound.contention)} contention",
            )
    for line in shape.timelines:
        if line.kind != "sequential" and line.spans:
            pairs = ", ".join(f"{_short(shape, a)} | {_short(shape, b)}" for a, b, _ in overlaps(line)[:2])
            share = overlap_fraction(line)
            which = "side by side" if line.kind == "plan" else "side by side, measured"
            yield which, f"{share:.0%} of the time at least two kernels run" + (f": {pairs}" if pairs else "")
    if memory is not None:
        yield (
            "memory",
            f"arena of {memory.arena_bytes / 2**20:.2f} MiB for {memory.requested_bytes / 2**20:.2f} MiB in "
            f"{_count(memory.buffers, 'buffer')}: sharing saves {memory.reuse:.0%}",
        )
        if memory.libraries:
            yield (
                "memory of libraries",
                f"{sum(memory.libraries) / 2**20:.0f} MiB reserved on {_count(len(memory.libraries), 'stream')} for "
                "workspaces and results",
            )
    if shape.critical:
        yield "critical path", f"{_count(len(shape.critical), 'kernel')}: {_route(shape)}"
    for note in shape.notes:
        yield "note", note


def _route(shape: ShapeReport, shown: int = 10) -> str:
    """Modules that the critical path leads through, in order, neighbours once."""
    labels: list[str] = []
    for index in shape.critical:
        label = shape.kernels[index].module or shape.kernels[index].operation
        if not labels or labels[-1] != label:
            labels.append(label)
    if len(labels) > shown:
        labels = [*labels[: shown // 2], "...", *labels[-shown // 2 :]]
    return " > ".join(labels)


def _candidates(shape: ShapeReport) -> Table:
    table = Table(title="schedules tried", title_justify="left")
    for name in ("", "policy / launch order", "streams", "waits", "predicted", "measured"):
        table.add_column(name, justify="left" if name.startswith("policy") or not name else "right")
    for row in shape.candidates:
        predicted, measured = (us(x) if x is not None else "" for x in (row.predicted, row.measured))
        mark = "kept" if row.chosen else ""
        _add(table, mark, row.policy, str(row.streams), str(row.waits), predicted, measured)
    return table


def _kernels(shape: ShapeReport, shown: int | None, width: int) -> Table:
    order = sorted(range(len(shape.kernels)), key=lambda k: shape.kernels[k].position)
    hidden = 0 if shown is None else max(0, len(order) - shown)
    more = f"{hidden} more: report.text(kernels=None), or report.save_html(...)" if hidden else None
    title = "kernels in launch order (* on the critical path)" + ("; numbers are estimated" if shape.estimated else "")
    table = Table(title=title, title_justify="left", caption=more, padding=(0, 0))
    names = [i for i, name in enumerate(_COLUMNS) if width >= _WIDE or name not in _WIDE_ONLY]
    rows = [[_cells(index, shape.kernels[index])[i] for i in names] for index in order[: len(order) - hidden]]
    widths = [max([len(_COLUMNS[i]), *(len(row[at]) for row in rows)]) for at, i in enumerate(names)]
    # What is left for the two columns of text, which are cut; rich would cut the numbers as well.
    left = max(40, width - sum(widths) + widths[1] + widths[2] - len(names) - 1)
    widths[2] = min(widths[2], left * 2 // 5)
    widths[1] = min(widths[1], left - widths[2])
    for at, i in enumerate(names):
        justify: Literal["left", "right"] = "left" if i in (1, 2) else "right"
        table.add_column(_COLUMNS[i], justify=justify, no_wrap=True, width=widths[at], overflow="ellipsis")
    for row in rows:
        _add(table, *row)
    return table


def _cells(index: int, row: KernelRow) -> list[str]:
    launch = row.launches[0] if row.launches else None
    mark = f"{index}{'*' if row.critical else ''}"
    cells = [mark, row.label, short_source(row.source), str(row.stream), f"{row.seconds * 1e6:.1f}"]
    if launch is None:
        return [*cells, "", "", "", "", "", "", "memory" if row.memory_bound else "compute"]
    several = f" (+{len(row.launches) - 1})" if len(row.launches) > 1 else ""
    return [
        *cells,
        f"{extent(launch.grid)}/{extent(launch.block)}{several}",
        str(launch.registers),
        str(launch.shared_memory),
        f"{launch.blocks_per_sm} {launch.limited_by}",
        f"{launch.waves:.2f}",
        f"{launch.share:.0%}",
        "memory" if row.memory_bound else "compute",
    ]


def _waits(shape: ShapeReport, shown: int | None, width: int) -> Table:
    hidden = 0 if shown is None else max(0, len(shape.waits) - shown)
    rows = [
        (_short(shape, wait.kernel), _short(shape, wait.awaited), _because(wait))
        for wait in shape.waits[: len(shape.waits) - hidden]
    ]
    table = Table(title="waits", title_justify="left", caption=f"{hidden} more" if hidden else None)
    headings = ("kernel", "waits for", "because")
    widths = [max(len(heading), *(len(row[at]) for row in rows)) for at, heading in enumerate(headings)]
    left = width - 10  # borders and padding
    widths[2] = min(widths[2], max(left // 3, left - widths[0] - widths[1]))
    for at, other in ((0, 1), (1, 0)):  # names share what the reason leaves
        widths[at] = min(widths[at], max((left - widths[2]) // 2, left - widths[2] - widths[other]))
    for heading, wide in zip(headings, widths, strict=True):
        table.add_column(heading, width=wide, overflow="ellipsis", no_wrap=True)
    for row in rows:
        _add(table, *row)
    return table


def _because(wait: WaitRow) -> str:
    return ", ".join(
        f"{h.kind} {h.buffer}" + ("" if (h.first, h.second) == (wait.awaited, wait.kernel) else " (indirectly)")
        for h in wait.hazards[:3]
    )


def _short(shape: ShapeReport, index: int) -> str:
    row = shape.kernels[index]
    return f"{index} {row.module or row.operation}"


def short_source(source: str) -> str:
    """`file.py:12` of a source line."""
    path = source.partition(" in ")[0]
    return path.replace("\\", "/").rpartition("/")[2]


def extent(sizes: tuple[int, int, int]) -> str:
    """A grid or block without trailing ones: `16` or `4,98`."""
    kept = [*sizes]
    while len(kept) > 1 and kept[-1] == 1:
        kept.pop()
    return ",".join(map(str, kept))


def us(seconds: float | None) -> str:
    """Seconds as microseconds, for people."""
    return "" if seconds is None else f"{seconds * 1e6:.1f} us"


def _spent(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
