"""`python -m opara_backend`: the command line.

Takes: arguments. Gives: an exit code, 0 if all went well. Must not change: anything.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence

from opara_backend.report import command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m opara_backend", description="Opara for PyTorch.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="classify a photograph with GoogLeNet and compare with plain Inductor")
    demo.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU, else cpu")
    demo.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on a GPU, else float32"
    )
    demo.add_argument("--calls", type=_positive, default=50, help="timed calls (default: %(default)s)")
    demo.set_defaults(run=lambda chosen: _demo(chosen.device, chosen.dtype, chosen.calls))
    command.add_parser(commands)
    chosen = parser.parse_args(argv)
    code: int = chosen.run(chosen)
    return code


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} given, at least 1 accepted")
    return value


def _demo(device: str | None, dtype: str | None, calls: int) -> int:
    import torch

    from opara_backend.demo.run import run

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
    kind = dtype or ("float16" if where == "cuda" else "float32")
    return (
        0 if run(torch.device(where, 0) if where == "cuda" else torch.device(where), getattr(torch, kind), calls) else 1
    )


if __name__ == "__main__":
    raise SystemExit(main())
