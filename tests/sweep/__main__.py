"""`python -m tests.sweep`: judge samples of PyTorch's operator database, and write the table.

Takes: which samples, on what device, in how many processes. Gives: `--out`, a JSON table, and beside it a journal, from
which `--resume` goes on. Exit status 1 if inductor is right anywhere that opara is wrong, raises or crashes.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from tests.sweep import samples
from tests.sweep.records import Case, Job, Setting
from tests.sweep.table import Journal, at_fault, table, text

# What makes compiling cheaper without changing what is scheduled: no vector instructions, headers compiled once.
_QUICK = {"TORCHINDUCTOR_VEC_ISA_OK": "0", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "1"}


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--samples", default="1", help="of each operator the first N, or all (default: 1)")
    parser.add_argument("--slice", default="0/1", metavar="I/N", help="every N-th of them, by a hash of their names")
    parser.add_argument("--operators", nargs="*", default=[], help="only these")
    parser.add_argument("--together", type=int, default=1, metavar="K", help="samples compiled as one function")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, help="stop after this long; --resume goes on")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one compilation and its calls")
    parser.add_argument("--both", action="store_true", help="compile with inductor even where opara agrees with eager")
    parser.add_argument("--unbacked", action="store_true", help="compile data-dependent shapes instead of breaking")
    parser.add_argument("--out", type=Path, default=Path("sweep.json"))
    parser.add_argument("--resume", action="store_true", help="keep what the journal beside --out holds")
    parser.add_argument("--commit", default="", help="noted in the table")
    return parser.parse_args(given)


def jobs(chosen: Sequence[Case], together: int) -> list[Job]:
    """Jobs of `together` samples each, mixed so that slow operators do not come in a row, the same on every machine."""
    ordered = sorted(chosen, key=lambda case: (samples.stable_hash(str(case)), case))
    return [Job(tuple(ordered[start : start + together])) for start in range(0, len(ordered), together)]


def chosen_cases(device: str, count: str, part: str, operators: Sequence[str] = ()) -> list[Case]:
    """The samples that the options name."""
    index, parts = (int(number) for number in part.split("/"))
    first = None if count == "all" else int(count)
    found = [case for name in operators or samples.operators() for case in samples.cases(name, device, first)]
    return [case for case in found if samples.stable_hash(str(case)) % parts == index]


def about(given: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """Where and how: everything in the table that is not a result."""
    import torch

    from bench.about import environment

    name = torch.cuda.get_device_name() if given.device == "cuda" else f"CPU {platform.machine()}"
    return {
        "command": "python -m tests.sweep " + " ".join(_without_paths(command)),
        "commit": given.commit,
        "device": name,
        "driver": environment(given.commit)["driver"],
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def _without_paths(command: Sequence[str]) -> Iterator[str]:
    for word in command:
        yield Path(word).name if word.startswith(("/", "$")) else word


def main(given: Sequence[str] | None = None) -> int:
    arguments = _arguments(given)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the processes are here already
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.device == "cpu":
        for name, value in _QUICK.items():
            os.environ.setdefault(name, value)
    from tests.sweep.pool import Pool

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(arguments.out.with_suffix(".jsonl"))
    if not arguments.resume:
        journal.path.unlink(missing_ok=True)
    wanted = chosen_cases(arguments.device, arguments.samples, arguments.slice, arguments.operators)
    before = journal.read()
    results = {case: before[case] for case in wanted if case in before}
    todo = jobs([case for case in wanted if case not in results], arguments.together)
    # Many processes time schedules on one GPU: the choice is worth nothing, so little time is spent on it.
    options = (("search_seconds", 0.02), ("remember", False)) if arguments.device == "cuda" else ()
    setting = Setting(arguments.device, arguments.both, arguments.limit, arguments.unbacked, options)
    pool = Pool(setting, arguments.processes, arguments.seconds)
    with Progress(*Progress.get_default_columns(), "{task.completed} of {task.total}") as progress:
        bar = progress.add_task("samples", total=len(wanted), completed=len(results))
        for found in pool.run(todo):
            journal.append(found)
            results.update({result.case: result for result in found})
            for result in at_fault(found):
                progress.console.print(f"{result.case}: {result.verdict}: {result.detail}", markup=False)
            progress.update(bar, completed=len(results))
    left = [case for case in wanted if case not in results]
    content = table(results.values(), about(arguments, sys.argv[1:] if given is None else given), left)
    arguments.out.write_text(text(content))
    print(f"{content['summary']}", flush=True)
    return 1 if at_fault(results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
