"""`python -m bench COMMAND`: the benchmarks of the opara backend.

Takes: command-line arguments. Gives: the exit code of the command. Must not change: anything itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench import campaign, ci, compare, first_calls, measuring, paper, plots
from bench.readme import PAGES, renewed


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the commands."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of the opara backend.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (measuring, first_calls, compare, plots, ci, campaign, paper):
        module.add(commands)
    commands.add_parser("readme", help="renew the generated parts of README.md and docs/").set_defaults(command=_readme)
    chosen = parser.parse_args(argv)
    done: int = chosen.command(chosen)
    return done


def _readme(chosen: argparse.Namespace) -> int:
    for page in PAGES:
        page.write_text(renewed(page.read_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
