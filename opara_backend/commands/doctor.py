"""`doctor`: is everything here that the backend needs, and does it work?

Takes: nothing but the machine. Gives: a table or JSON, and 0 if nothing is broken, else 1. A machine without a GPU is
not broken. Must not change: anything but Inductor's cache, which the trial's programs enter.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from opara_backend._version import __version__
from opara_backend.commands.console import show_table


def register(commands: Any) -> None:
    """Add this command."""
    parser = commands.add_parser(
        "doctor",
        help="check versions, devices, compiler and cache, and try the backend on each device",
        description="Exit code 0 if nothing is broken. A machine without a GPU is not broken.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else, on standard output")
    parser.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> int:
    from opara_backend.commands.checks import BROKEN, findings

    found = list(findings())
    broken = [finding for finding in found if finding.status == BROKEN]
    if chosen.json:
        document = {"schema": 1, "version": __version__, "ok": not broken, "findings": [asdict(f) for f in found]}
        print(json.dumps(document, indent=1))
        return 1 if broken else 0
    rows = [(f.name, f.status, f.text, f.remedy) for f in found]
    show_table(f"opara_backend {__version__}", ("what", "status", "found", "what to do"), rows)
    print(f"broken: {', '.join(f.name for f in broken)}" if broken else "all is well")
    return 1 if broken else 0
