"""The trace, read back: by ourselves, and by a tool for traces that knows nothing of us."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from opara_backend.report.model import ShapeReport
from tests.recorded_replays import NAMES, report_of


def shape_of(name: str) -> ShapeReport:
    return report_of(name).shapes()[0]


@pytest.mark.parametrize("name", NAMES)
def test_kernels_streams_and_durations_are_those_of_the_report(name: str, tmp_path: Path) -> None:
    shape = shape_of(name)
    document = json.loads(report_of(name).save_trace(tmp_path / "trace.json").read_text())
    events = document["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert [text.split(",")[0] for text in names.values()] == ["chosen schedule", "one stream", "chosen schedule"]
    for pid, timeline in zip(names, shape.timelines, strict=True):
        kernels = [e for e in events if e["ph"] == "X" and e["pid"] == pid]
        assert Counter(e["tid"] for e in kernels) == Counter(s.stream for s in timeline.spans)
        for e, span in zip(kernels, timeline.spans, strict=True):
            assert e["name"] == shape.kernels[span.kernel].label
            assert e["dur"] == pytest.approx((span.end - span.start) * 1e6)
            if timeline.kind == "sequential":
                assert e["dur"] == pytest.approx(shape.kernels[span.kernel].seconds * 1e6)
        starts = [e for e in events if e["ph"] == "s" and e["pid"] == pid]
        ends = [e for e in events if e["ph"] == "f" and e["pid"] == pid]
        wanted = 0 if timeline.kind == "sequential" else len(shape.waits)
        assert len(starts) == len(ends) == wanted


def test_holistic_trace_analysis_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HolisticTraceAnalysis is heavy (it wants Jupyter), so it is no dependency of the tests: pip install it to run."""
    reader = pytest.importorskip("hta.common.trace")
    monkeypatch.setenv("HTA_DISABLE_NS_ROUNDING", "1")
    report, shape = report_of("googlenet"), shape_of("googlenet")
    path = report.save_trace(tmp_path / "trace.json")
    parsed = reader.Trace(trace_files={0: str(path)}, trace_dir="")
    parsed.parse_traces(use_multiprocessing=False)
    table, symbols = parsed.get_trace(0), parsed.symbol_table.get_sym_table()
    kernels = table[table["cat"].map(lambda c: symbols[c]) == "kernel"]
    assert len(kernels) == 3 * len(shape.kernels)
    for pid, timeline in enumerate(shape.timelines, start=1):
        rows = kernels[kernels["pid"] == pid]
        assert len(rows) == len(timeline.spans)
        assert Counter(rows["stream"].astype(int)) == Counter(s.stream for s in timeline.spans)
        spans = {s.kernel + 1: s for s in timeline.spans}
        for row in rows.itertuples():
            span = spans[int(row.correlation)]
            assert symbols[row.name] == shape.kernels[span.kernel].label
            assert row.dur == pytest.approx((span.end - span.start) * 1e6)
