"""`python -m opara_backend`: the command line.

Takes: arguments. Gives: an exit code, 0 if all went well. Must not change: anything.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from opara_backend._version import __version__

# Modules that each register one command, in the order of the help text.
COMMANDS = ("commands.demo", "report.command", "commands.doctor", "commands.cache")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m opara_backend",
        description='Opara for PyTorch: torch.compile(model, backend="opara").',
        epilog="Exit codes: 0 all went well, 1 something is wrong, 2 wrong arguments or a machine that cannot do it.",
    )
    parser.add_argument("--version", action="version", version=f"opara-backend {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"opara_backend.{name}").register(commands)
    chosen = parser.parse_args(argv)
    try:
        code: int = chosen.run(chosen)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, `head` perhaps, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    raise SystemExit(main())
