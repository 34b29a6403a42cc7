"""`python -m bench plot`: what a README can show, drawn from committed results alone.

Takes: results files, recorded kernel graphs, the baseline of schedule quality. Gives: a PNG and an SVG per plot.
Must not change: anything but those. The same input gives the same bytes. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import documents, schedule_quality
from bench.recorded import Recording, load_all
from bench.samples import STOCK, Results, loaded, median
from bench.tables import console, geometric_mean
from opara_backend.scheduling.bounds import lower_bound

SURFACE, INK, MUTED, GRID = "#fcfcfb", "#0b0b0b", "#52514e", "#e1e0d9"
SERIES = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7", "#e34948")
WIDTH = 8.0  # inches; a README shows about 830 pixels
FORMATS = {"png": {"Software": None}, "svg": {"Date": None}}


@dataclass(frozen=True)
class Bars:
    """Horizontal bars: a label per group, and per series one value a group (None draws nothing).

    line: (value, what it means), drawn across.
    """

    title: str
    axis: str
    labels: tuple[str, ...]
    series: tuple[tuple[str, tuple[float | None, ...]], ...]
    line: tuple[float, str] | None = None
    text: Callable[[float], str] = "{:.2f}".format


@dataclass(frozen=True)
class Lines:
    """Values against batch, one line a name: (name, ((batch, value), ...))."""

    title: str
    axis: str
    series: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]


def speed_up(results: Sequence[Results], batch: int = 1) -> Bars:
    """How many times as fast as stock Inductor's CUDA Graphs, by model, one series an element type."""
    found: dict[str, dict[str, float]] = {}
    for document in results:
        for case, stock, ours in document.both():
            if case[2] == batch:
                found.setdefault(case[1], {})[case[0]] = median(stock) / median(ours)
    models = sorted({m for by in found.values() for m in by}, key=lambda m: -max(by.get(m, 0) for by in found.values()))
    series = tuple(
        (f"{dtype} (mean {geometric_mean(by.values()):.2f}x)", tuple(by.get(m) for m in models))
        for dtype, by in found.items()
    )
    title, axis = f"Speed-up over {STOCK}, batch {batch}", "times as fast, GPU time"
    return Bars(title, axis, tuple(models), series, (1.0, "as fast"), "{:.2f}x".format)


def gap(recordings: Sequence[Recording]) -> Bars:
    """How far the kernels in a row, and the schedule kept, lie above what no schedule can beat."""
    rows = []
    for recording in recordings:
        bound = lower_bound(recording.graph, recording.profile)
        if recording.measured and bound:
            times = [m.seconds for m in recording.measured]
            rows.append((recording.name, times[0] / bound, min(times) / bound))  # one stream is always tried first
    rows.sort(key=lambda row: row[2])
    return Bars(
        "Measured time over the lower bound (critical path and work)",
        "times the bound",
        tuple(name.replace("-", " ") for name, _, _ in rows),
        (("one stream", tuple(r[1] for r in rows)), ("schedule kept", tuple(r[2] for r in rows))),
        (1.0, "no schedule can be faster"),
    )


def batches(results: Sequence[Results]) -> Lines:
    """Speed-up against batch: the gain shrinks as single kernels fill the GPU."""
    shown = _against_batch(results)
    series = tuple((n, tuple((b, stock / ours) for b, ours, stock in points)) for n, points in shown)
    return Lines(f"Speed-up over {STOCK} against batch", "times as fast, GPU time", series)


def makespans(results: Sequence[Results]) -> Lines:
    """Time of one call against batch, this backend."""
    shown = _against_batch(results)
    series = tuple((n, tuple((b, ours * 1e3) for b, ours, _ in points)) for n, points in shown)
    return Lines("GPU time of one call against batch", "ms", series)


def _against_batch(results: Sequence[Results]) -> list[tuple[str, list[tuple[int, float, float]]]]:
    """Per model, of one element type of the run with most batches: (batch, our seconds, stock seconds).

    As many models as there are colours to tell them apart, those that gain most at their smallest batch.
    """
    for document in sorted(results, key=lambda document: -len({case[2] for case, _, _ in document.both()})):
        found: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
        for case, stock, ours in document.both():
            by_model = found.setdefault(case[1], {})
            by_model.setdefault(f"{case[0]} {case[1]}", []).append((case[2], median(ours), median(stock)))
        for by_model in found.values():
            several = [(name, sorted(points)) for name, points in by_model.items() if len(points) > 1]
            if several:
                several.sort(key=lambda entry: entry[1][0][1] / entry[1][0][2])
                return several[: len(SERIES)]
    return []


def memory(rows: Sequence[dict[str, Any]]) -> Bars:
    """Bytes of the memory plan as a share of what the buffers take without sharing, one stream and this schedule."""
    policies = {"sequential/program on 1": "one stream", "list_k/critical_path on 4": "4 streams"}
    policies["opara/opara on 8"] = "Algorithms 1 and 2, 8 streams"
    share: dict[str, dict[str, float]] = {policy: {} for policy in policies}
    for row in rows:
        if row["policy"] in share and row["unshared_bytes"] and row["graph"].endswith("-float16"):
            share[row["policy"]][row["graph"]] = 100 * row["arena_bytes"] / row["unshared_bytes"]
    graphs = sorted({g for by in share.values() for g in by})
    series = tuple((policies[p], tuple(by.get(g) for g in graphs)) for p, by in share.items() if by)
    labels = tuple(g.replace("-", " ") for g in graphs)
    title = "Memory of intermediates, buffers sharing bytes"
    return Bars(title, "per cent of what they take without sharing", labels, series, text="{:.0f}".format)


def draw(chart: Bars | Lines, folder: Path, name: str) -> list[Path]:
    """Write `chart` as PNG and SVG; nothing if there is nothing in it."""
    if not chart.series or (isinstance(chart, Bars) and not chart.labels):
        return []
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    settings = {
        "svg.hashsalt": name,
        "svg.fonttype": "path",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": MUTED,
    }
    with pyplot.rc_context({**settings, "xtick.color": MUTED, "ytick.color": INK}):
        figure, axes = _bars(pyplot, chart) if isinstance(chart, Bars) else _lines(pyplot, chart)
        axes.set_title(chart.title, loc="left", fontsize=12, color=INK, pad=28)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.set_axisbelow(True)
        made = []
        folder.mkdir(parents=True, exist_ok=True)
        for kind, metadata in FORMATS.items():
            path = folder / f"{name}.{kind}"
            figure.savefig(path, dpi=130, bbox_inches="tight", facecolor=SURFACE, metadata=metadata)
            made.append(path)
        pyplot.close(figure)
    return made


def _bars(pyplot: Any, chart: Bars) -> tuple[Any, Any]:
    thick = 0.8 / len(chart.series)
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.9 + len(chart.labels) * (0.13 + 0.19 * len(chart.series))))
    for index, (name, values) in enumerate(chart.series):
        known = [(i, v) for i, v in enumerate(values) if v is not None]
        at = [i - 0.4 + thick * (index + 0.5) for i, _ in known]
        widths = [v for _, v in known]
        axes.barh(at, widths, height=0.86 * thick, color=SERIES[index], label=name)
        for y, value in zip(at, widths, strict=True):
            axes.text(value, y, f" {chart.text(value)}", va="center", ha="left", fontsize=8, color=MUTED)
    if chart.line is not None:
        axes.axvline(chart.line[0], color=MUTED, linewidth=1, linestyle=(0, (3, 3)), label=chart.line[1])
    axes.set_yticks(range(len(chart.labels)), chart.labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(chart.labels) - 0.45, -0.55)
    axes.margins(x=0.08)
    axes.set_xlabel(chart.axis)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    _legend(axes)
    return figure, axes


def _lines(pyplot: Any, chart: Lines) -> tuple[Any, Any]:
    figure, axes = pyplot.subplots(figsize=(WIDTH, 4.2))
    for color, (name, points) in zip(SERIES, chart.series, strict=False):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=color, linewidth=2, marker="o", markersize=5, label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({x for _, points in chart.series for x, _ in points})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("batch")
    axes.set_ylabel(chart.axis)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, fontsize=9, borderpad=0.1)


def charts(results: Sequence[Results]) -> dict[str, Bars | Lines]:
    """Every plot by its file's name."""
    quality = documents.read(schedule_quality.BASELINE, schedule_quality.SCHEMA)["rows"]
    return {
        "speed_up": speed_up(results),
        "gap": gap(load_all()),
        "batches": batches(results),
        "makespans": makespans(results),
        "memory": memory(quality),
    }


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The subcommand `plot`."""
    parser = commands.add_parser("plot", help="draw committed results as PNG and SVG")
    parser.add_argument("results", nargs="*", type=Path, help="default: every h200*.json in bench/results")
    parser.add_argument("--out", type=Path, default=documents.RESULTS / "plots", metavar="FOLDER")
    parser.set_defaults(command=main)


def main(chosen: argparse.Namespace) -> int:
    """Entry point of `plot`."""
    output = console()
    results = loaded(chosen.results, output.print)
    if results is None:
        return 2
    for name, chart in charts(results).items():
        made = draw(chart, chosen.out, name)
        output.print(f"{name}: {', '.join(p.name for p in made) or 'nothing to draw yet in these results'}")
    return 0
