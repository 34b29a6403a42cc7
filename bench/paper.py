"""`python -m bench paper`: the claims of the Opara paper beside what we measured, on our kernels and on unfused ones.

Takes: results files, recorded kernel graphs. Gives: a table, a row a claim; what no file holds yet is said, with the
command that measures it. Must not change: anything. Imports no torch. Ratios are of medians, the range over models.

On unfused kernels, ATen's own, stands the paper's setting: its two algorithms against the same kernels one by one, in a
row, and under its rivals' policies. On our kernels the same algorithms schedule what Inductor fused.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.recorded import load_all
from bench.samples import Case, Results, loaded, median
from bench.scheduling_time import PAPER as PAPER_TIMES
from bench.scheduling_time import measure as scheduling_times
from bench.tables import console, table

MODELS = ("googlenet", "inception_v3", "deepfm", "nasnet_large", "bert_base", "t5_small")
RUN = "python -m bench campaign --models {} --batches {} --out FOLDER"
FUSED, UNFUSED = "opara:paper", "opara:paper-unfused"


@dataclass(frozen=True)
class Claim:
    """What the paper says: the times of `fused` over `FUSED` on our kernels, of `unfused` over `UNFUSED` on ATen's."""

    text: str
    figure: str
    fused: str
    unfused: str
    models: tuple[str, ...] = MODELS
    batches: tuple[int, ...] = (1,)


CLAIMS = (
    Claim("against PyTorch eager", "1.80x to 10.97x", "eager", "eager"),
    Claim("against sequential CUDA Graph", "up to 1.68x", "cudagraph", "cudagraph"),
    Claim("against Nimble's policy", "up to 1.29x", "opara:nimble", "opara:nimble-unfused"),
    Claim("against Rammer's policy (wavefront)", "up to 1.18x", "opara:wavefront", "opara:wavefront-unfused"),
    Claim(
        "launch order alone, GoogLeNet",
        "up to 29 % (RTX 2080 SUPER), about 10 % (A100)",
        f"{FUSED},launch_order=program",
        f"{UNFUSED},launch_order=program",
        ("googlenet",),
    ),
    Claim("Inception-v3, batch 1, against sequential CUDA Graph", "1.41x", "cudagraph", "cudagraph", ("inception_v3",)),
    Claim(
        *("Inception-v3, batch 32, against sequential CUDA Graph", "1.09x", "cudagraph", "cudagraph"),
        models=("inception_v3",),
        batches=(32,),
    ),
)
NOT_MEASURED = (
    ("against ONNX Runtime", "up to 2.97x", "another runtime with kernels of its own: not part of this benchmark"),
    ("overlapping compute with memory", "12.7 to 13.6 % in two cases", "needs a profiler's counters: ncu, nsys"),
    ("SM efficiency above sequential CUDA Graph", "36 to 126 %", "needs a profiler's counters: ncu, nsys"),
)


def ratios(results: Sequence[Results], claim: Claim, base: str, ours: str) -> dict[Case, float]:
    """How many times as long `base` takes as `ours`, for each case of the claim that was measured."""
    found: dict[Case, float] = {}
    for document in results:
        for case in document.cases():
            old, new = document.of(case, base), document.of(case, ours)
            if old and new and case[0] in claim.models and case[2] in claim.batches:
                found[case] = median(old) / median(new)
    return found


def span(found: dict[Case, float]) -> str:
    """The range over cases, and the case at its top."""
    if not found:
        return "missing"
    top = max(found, key=lambda case: found[case])
    return f"{min(found.values()):.2f}x to {found[top]:.2f}x ({top[0]} {top[1]})"


def speed_rows(results: Sequence[Results]) -> Iterator[tuple[str, ...]]:
    """One row a claim about speed."""
    for claim in CLAIMS:
        fused = ratios(results, claim, claim.fused, FUSED)
        unfused = ratios(results, claim, claim.unfused, UNFUSED)
        yield claim.text, claim.figure, span(fused), span(unfused)


def best_row(results: Sequence[Results]) -> tuple[str, ...]:
    """What the paper has not: our best schedule on our kernels against its algorithms on its kernels."""
    ours = ratios(results, Claim("", "", UNFUSED, UNFUSED), UNFUSED, "opara")
    return "the paper's setting over ours (policy auto)", "-", span(ours), "1"


def overhead_rows(results: Sequence[Results]) -> Iterator[tuple[str, ...]]:
    """One row a claim about the time it takes to schedule; ours on recorded graphs, in milliseconds."""
    for times in scheduling_times(load_all()):
        opara, nimble = PAPER_TIMES[times.model]
        yield (
            f"time of Algorithm 1, {times.model}",
            f"{opara} ms",
            f"{times.opara:.3f} ms, {times.kernels} kernels",
            "-",
        )
        yield f"time of Nimble's matching, {times.model}", f"{nimble} ms", f"{times.nimble:.2f} ms", "-"
    spent = {
        unfused: [r.profile_seconds for d in results for r in d.rows if r.profile_seconds and r.backend == backend]
        for unfused, backend in ((False, "opara"), (True, UNFUSED))
    }
    found = [f"{statistics.median(s) * 1e3:.1f} ms" if s else "missing" for s in spent.values()]
    yield "profiling overhead", "4.25 ms", *found


def missing(results: Sequence[Results]) -> list[str]:
    """The commands that measure what no file holds yet."""
    needed: dict[int, dict[str, None]] = {}
    for claim in CLAIMS:
        for base, ours in ((claim.fused, FUSED), (claim.unfused, UNFUSED)):
            have = {(case[0], case[2]) for case in ratios(results, claim, base, ours)}
            for model in claim.models:
                for batch in claim.batches:
                    if (model, batch) not in have:
                        needed.setdefault(batch, {})[model] = None
    return [RUN.format(" ".join(found), batch) for batch, found in needed.items()]


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """The same table for a README."""
    lines = ["| claim | the paper | on our kernels | on unfused kernels |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def all_rows(results: Sequence[Results]) -> list[tuple[str, ...]]:
    """Every claim, in the paper's order; those that cannot be measured say why."""
    others = [(text, figure, why, "-") for text, figure, why in NOT_MEASURED]
    return [*speed_rows(results), best_row(results), *others, *overhead_rows(results)]


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The subcommand `paper`."""
    parser = commands.add_parser("paper", help="the paper's claims beside what the results files hold")
    parser.add_argument("results", nargs="*", type=Path, help="default: every h200*.json in bench/results")
    parser.add_argument("--markdown", action="store_true", help="as a README shows it")
    parser.set_defaults(command=main)


def main(chosen: argparse.Namespace) -> int:
    """Entry point of `paper`: 0 even where something is missing, which is said."""
    output = console()
    results = loaded(chosen.results, output.print)
    if results is None:
        return 2
    rows = all_rows(results)
    if chosen.markdown:
        print(markdown(rows))
    else:
        output.print(table("The paper's claims", ("claim", "the paper", "on our kernels", "on unfused kernels"), rows))
    for command in missing(results):
        output.print(f"missing; measure it on a GPU with: {command}", soft_wrap=True)
    return 0
