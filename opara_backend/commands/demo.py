"""`demo`: classify a photograph with GoogLeNet and compare with plain Inductor; see `opara_backend.demo.run`.

Takes: a device, an element type, a number of timed calls. Gives: a table, and 0 if the result agrees with eager.
Must not change: anything. 2: this machine cannot run it, and standard error says what is missing.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from opara_backend.commands.console import positive


def register(commands: Any) -> None:
    """Add this command."""
    parser = commands.add_parser("demo", help="classify a photograph with GoogLeNet and compare with plain Inductor")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU, else cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on a GPU, else float32"
    )
    parser.add_argument("--calls", type=positive, default=50, help="timed calls (default: %(default)s)")
    parser.set_defaults(run=lambda chosen: _run(chosen.device, chosen.dtype, chosen.calls))


def _run(device: str | None, dtype: str | None, calls: int) -> int:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: this torch sees no CUDA device; leave the option out to run on the CPU", file=sys.stderr)
        return 2
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    compiler = os.environ.get("CXX", "g++")
    if where == "cpu" and shutil.which(compiler) is None:
        print(
            f"no C++ compiler: {compiler!r} is nowhere on PATH. Inductor compiles for the CPU with one: install g++, "
            "or name yours in the environment variable CXX",
            file=sys.stderr,
        )
        return 2
    try:
        from opara_backend.demo.run import run
    except ImportError as error:
        print(f"the demo needs {error.name}: pip install 'opara-backend[demo]'", file=sys.stderr)
        return 2
    kind = getattr(torch, dtype or ("float16" if where == "cuda" else "float32"))
    place = torch.device(where, 0) if where == "cuda" else torch.device(where)
    return 0 if run(place, kind, calls) else 1
