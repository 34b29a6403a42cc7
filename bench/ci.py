"""`python -m bench ci`: what a change made worse, on any machine without a GPU, against a committed baseline.

Takes: reduced models, recorded kernel graphs, the baseline of these versions of Python and torch. Gives: a table; exit
code 1 if outputs are wrong, or a figure is worse than the baseline by more than its limit, or is gone. With --fast only
what is counted, not what is timed. Must not change: anything, but the baseline with --update.

Every figure is the lower the better, and none is in seconds: functions called per call of a compiled model, over those
of stock Inductor; time per call over stock Inductor's in the same rounds; instructions to schedule and to plan a
recorded graph, per kernel; modules that importing the backend loads beside torch, and its time over torch's.
Schedule quality has a baseline of its own, which is compared as well unless --fast.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from bench import documents, recorded, schedule_quality
from bench.counting import calls, instructions
from bench.regressions import Comparison, Figures, Key, compare
from bench.run import CALLS, Job, prepare, run_job
from bench.tables import console, table
from bench.variants import variant
from opara_backend.memory import plan_memory
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.simulator import simulate

SCHEMA = 1
BASELINE = documents.RESULTS / "ci.json"
MODELS = ("two_tower", "deepfm", "squeezenet")
GRAPHS = ("googlenet-float16", "t5_small-float16")
BACKENDS = ("inductor", "opara", "opara:paper-unfused")
COUNTED, TIMED = 0.04, 0.60  # how much worse is still no change; what is counted is the same in every run
TIMED_FIGURES = ("time over inductor", "import time over torch")
_IMPORTS = """
import json, sys, time
start = time.perf_counter(); import torch; middle = time.perf_counter(); before = set(sys.modules)
import opara_backend.backend
end = time.perf_counter()
print(json.dumps([len(set(sys.modules) - before), (end - middle) / (middle - start)]))
"""

Found = dict[Key, dict[str, float]]


def versions() -> str:
    """What counts depend on: versions of Python and torch, without the last number."""
    parts = (platform.python_version(), torch.__version__.split("+")[0])
    return ", ".join(f"{name} {'.'.join(v.split('.')[:2])}" for name, v in zip(("Python", "torch"), parts, strict=True))


def per_call(model: str) -> dict[str, float]:
    """Functions called per call under this backend, over those under stock Inductor."""
    job = Job(model, "float32", 1, BACKENDS[:2], small=True)
    module, inputs, _ = prepare(job)
    count = {}
    with torch.inference_mode():
        for backend in job.backends:
            torch._dynamo.reset()
            call = partial(variant(backend).compile(module), *inputs)
            for _ in range(CALLS):
                call()
            count[backend] = calls(call)
    return {"functions called over inductor": round(count["opara"] / count["inductor"], 4)}


def correct(model: str, rounds: int) -> tuple[dict[str, float], tuple[str, ...]]:
    """Time per call over stock Inductor's, the best rounds of each; and what must not be reported."""
    rows = run_job(Job(model, "float32", 1, BACKENDS, rounds, small=True))
    best = {row.backend: min(row.samples.wall) for row in rows if row.samples is not None}
    wrong = tuple(f"{model} under {row.backend}: {row.problem}" for row in rows if row.problem)
    return {} if wrong else {"time over inductor": round(best["opara"] / best["inductor"], 3)}, wrong


def scheduling(name: str) -> dict[str, float]:
    """Instructions per kernel of what is done with a recorded graph."""
    recording = recorded.load(recorded.FOLDER / f"{name}.json.gz")
    graph, profile, device = recording.graph, recording.profile, recording.profile.device
    assert device is not None
    listed = partial(build, graph, profile, policy="list_k", launch_order="critical_path", streams=4)
    schedule = listed()
    work: dict[str, Callable[[], object]] = {
        "Algorithms 1 and 2": partial(build, graph, profile, policy="opara", launch_order="opara", streams=8),
        "list scheduling": listed,
        "memory plan": partial(plan_memory, graph, schedule),
        "simulation": partial(simulate, graph, profile, schedule, device),
    }
    return {f"{what}, instructions a kernel": round(instructions(call) / len(graph), 1) for what, call in work.items()}


def importing(runs: int) -> dict[str, float]:
    """Modules that importing the backend loads beside torch, and its time over torch's, by fresh processes."""
    found = [
        json.loads(subprocess.run([sys.executable, "-c", _IMPORTS], check=True, capture_output=True, text=True).stdout)
        for _ in range(runs)
    ]
    return {
        "modules imported": float(found[0][0]),
        "import time over torch": round(statistics.median(ratio for _, ratio in found), 4),
    }


def measure(fast: bool, rounds: int) -> tuple[Found, list[str]]:
    """Every figure, and what is wrong."""
    found: Found = {}
    wrong: list[str] = []
    for model in MODELS[: 1 if fast else None]:
        times, problems = correct(model, 1 if fast else rounds)
        wrong.extend(problems)
        found[("call", model)] = {} if problems else {**per_call(model), **times}
    for name in GRAPHS:
        found[("schedule", name)] = scheduling(name)
    found[("import", "opara_backend")] = importing(1 if fast else 5)
    if fast:
        found = {key: {n: v for n, v in own.items() if n not in TIMED_FIGURES} for key, own in found.items()}
    return found, wrong


def compared(before: Figures, after: Figures) -> Comparison:
    """Each figure by its own limit; figures of the baseline that this run leaves out on purpose are not gone."""
    timed = {key: {n: v for n, v in own.items() if n in TIMED_FIGURES} for key, own in after.items()}
    counted = {key: {n: v for n, v in own.items() if n not in TIMED_FIGURES} for key, own in after.items()}
    by_time, by_count = compare(before, timed, limit=TIMED), compare(before, counted, limit=COUNTED)
    return Comparison(
        worse=(*by_count.worse, *by_time.worse),
        better=(*by_count.better, *by_time.better),
        gone=by_count.gone,
        new=by_count.new,
    )


def _document(baselines: dict[str, Found]) -> dict[str, object]:
    rows = [
        {"versions": v, "what": key[0], "of": key[1], "figures": own}
        for v, found in baselines.items()
        for key, own in found.items()
    ]
    return {"schema": SCHEMA, "rows": rows}


def _baselines(path: Path) -> dict[str, Found]:
    found: dict[str, Found] = {}
    if path.exists():
        for row in documents.read(path, SCHEMA)["rows"]:
            found.setdefault(row["versions"], {})[(row["what"], row["of"])] = row["figures"]
    return found


def _report(comparison: Comparison, found: Found) -> Iterator[object]:
    yield table(
        versions(),
        ("what", "of", "figure", "value"),
        [(*k, n, f"{v:,.10g}") for k, own in found.items() for n, v in own.items()],
    )
    headings = ("what", "of", "figure", "baseline", "now", "change")
    for word, changes in (("Better than", comparison.better), ("WORSE than", comparison.worse)):
        if changes:
            yield table(f"{word} the baseline", headings, [change.row() for change in changes])
    yield from (f"gone: {', '.join(key)}" for key in comparison.gone)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The subcommand `ci`."""
    parser = commands.add_parser("ci", help="compare what needs no GPU with the committed baseline")
    parser.add_argument("--fast", action="store_true", help="one model, counts only")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE")
    parser.add_argument("--update", action="store_true", help="write the baseline of these versions")
    parser.set_defaults(command=main)


def main(chosen: argparse.Namespace) -> int:
    """Entry point of `ci`."""
    output = console()
    try:
        baselines = _baselines(chosen.baseline)
    except (ValueError, KeyError) as error:
        output.print(f"no baseline to compare with: {error}")
        return 2
    found, wrong = measure(chosen.fast, chosen.rounds)
    before = baselines.get(versions(), {})
    if chosen.fast:
        before = {key: own for key, own in before.items() if key in found}
    comparison = compared(before, found)
    for part in _report(comparison, found):
        output.print(part)
    for text in wrong:
        output.print(f"WRONG: {text}")
    if not before:
        output.print(f"no baseline for {versions()}: nothing was compared; known: {'; '.join(baselines) or 'none'}")
    accepted = comparison.accepted and not wrong
    if chosen.update and not wrong and not chosen.fast:
        documents.write(chosen.baseline, _document({**baselines, versions(): found}))
        return 0
    if not chosen.fast:
        accepted = schedule_quality.main([]) == 0 and accepted
    output.print("as good as the baseline" if accepted else "if this is meant: python -m bench ci --update")
    return 0 if accepted else 1
