"""What can be seen from outside: log messages, profiler scopes, and artefacts for `tlparse`."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opara_backend.kernel_graph import KernelGraph
from opara_backend.report import annotate
from opara_backend.report.record import collect

Run = Callable[..., Any]


class Branches(torch.nn.Module):
    """Three kernels or more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([(x @ x).relu(), (x @ x.T).tanh()])


def scopes(options: dict[str, Any], calls: int = 3) -> tuple[dict[str, int], Any]:
    """How often each scope of ours was entered in `calls` calls, and the record of the graph."""
    compiled = torch.compile(Branches(), backend="opara", options=options)
    x = torch.ones(4, 4)
    with torch.no_grad(), collect() as records, torch.profiler.profile() as profile:
        for _ in range(calls):
            compiled(x)
    (record,) = records
    names = [f"{kernel.name} {kernel.call}" for kernel in record.graph.kernels]
    found = {event.key: event.count for event in profile.key_averages()}
    return {n: c for n, c in found.items() if n in names or n.startswith("opara graph")}, record


def test_annotate_names_calls_and_kernels() -> None:
    found, record = scopes({"annotate": True})
    assert found == {
        f"opara graph {record.compile_id}": 3,
        **{f"{kernel.name} {kernel.call}": 3 for kernel in record.graph.kernels},
    }
    assert str(record.compile_id) == "0/0"


def test_kernels_lie_inside_their_call() -> None:
    compiled = torch.compile(Branches(), backend="opara", options={"annotate": True})
    with torch.no_grad():
        compiled(torch.ones(4, 4))
        with torch.profiler.profile() as profile:
            compiled(torch.ones(4, 4))
    (call,) = [event for event in profile.events() if event.name.startswith("opara graph")]
    kernels = [event for event in profile.events() if event.name.startswith("k0 ")]
    assert kernels
    assert all(call.time_range.start <= k.time_range.start <= k.time_range.end <= call.time_range.end for k in kernels)


def test_without_annotate_nothing_of_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(*_: Any) -> None:
        raise AssertionError("annotated without the option")

    monkeypatch.setattr(annotate, "named_call", used)
    monkeypatch.setattr(annotate, "named_kernels", used)
    monkeypatch.setattr(annotate, "ranged", used)
    found, record = scopes({})
    assert found == {}
    assert record.plans


TRACED = """
import sys
import torch

class Branches(torch.nn.Module):
    def forward(self, x):
        return torch.cat([(x @ x).relu(), (x @ x.T).tanh()])

compiled = torch.compile(Branches(), backend="opara")
with torch.no_grad():
    for _ in range(2):
        compiled(torch.ones(4, 4))
print()
print("null")
"""


@pytest.fixture(scope="module")
def traced(run_python: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file that TORCH_TRACE wrote, and what TORCH_LOGS wrote, of one process."""
    folder = tmp_path_factory.mktemp("trace")
    log = folder / "log.txt"
    environment = {"TORCH_TRACE": str(folder / "trace"), "TORCH_LOGS": "+opara_backend", "TORCH_LOGS_OUT": str(log)}
    run_python(TRACED, environment=environment)
    (trace,) = (folder / "trace").iterdir()
    return trace, log.read_text()


def test_torch_logs_takes_the_packages_name(traced: tuple[Path, str]) -> None:
    """pytorch#173759: names of other out-of-tree backends raise."""
    _, log = traced
    assert "opara_backend" in log
    assert "kernels, in order" in log


def artefacts(trace: Path) -> dict[str, list[tuple[dict[str, Any], Any]]]:
    """Ours, by name: the log's entry and the payload, which stands indented on the lines after it."""
    found: dict[str, list[tuple[dict[str, Any], Any]]] = {}
    lines = trace.read_text().splitlines()
    for number, line in enumerate(lines):
        if '"artifact"' not in line or '"opara_' not in line:
            continue
        entry = json.loads(line[line.index("{") :])
        payload = []
        for text in lines[number + 1 :]:
            if not text.startswith("\t"):
                break
            payload.append(text[1:])
        found.setdefault(entry["artifact"]["name"], []).append((entry, json.loads("\n".join(payload))))
    return found


def test_the_structured_trace_holds_the_graph_and_the_schedule(traced: tuple[Path, str]) -> None:
    found = artefacts(traced[0])
    assert set(found) == {"opara_kernel_graph", "opara_schedule"}
    ((entry, document),) = found["opara_kernel_graph"]
    assert (entry["frame_id"], entry["frame_compile_id"]) == (0, 0)
    graph = KernelGraph.from_json(json.dumps(document))
    graph.verify()
    ((entry, schedule),) = found["opara_schedule"]
    assert (entry["frame_id"], entry["frame_compile_id"]) == (0, 0)
    assert schedule["schema"] == 1
    assert sorted(launch["kernel"] for launch in schedule["launches"]) == sorted(k.name for k in graph.kernels)
    assert not schedule["captured"]


@pytest.mark.skipif(shutil.which("tlparse") is None, reason="tlparse is not installed: pip install tlparse")
def test_tlparse_shows_both(traced: tuple[Path, str], tmp_path: Path) -> None:
    command = ["tlparse", str(traced[0]), "--no-browser", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "out").rglob("*")}
    for name in ("opara_kernel_graph", "opara_schedule"):
        assert any(file.startswith(name) for file in made), made
        assert name in (tmp_path / "out" / "index.html").read_text()
