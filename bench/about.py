"""What figures depend on: device, driver, versions, commit, command.

Takes: this machine and the command line. Gives: the fields of a results file beside its rows, and of a recording.
Must not change: anything. No path of the machine gets in: where files are put is nobody else's business.
"""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

PRIVATE = ("--out", "--record", "--commit", "--caches", "--go-on")  # options whose values say where, not what


def command(arguments: Sequence[str], program: str = "python -m bench") -> str:
    """The command line that measures the same again."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        private = argument.partition("=")[0] in PRIVATE
        if not skip and not private:
            kept.append(argument)
        skip = private and "=" not in argument
    return " ".join([program, *kept])


def environment(commit: str | None, program: str = "python -m bench") -> dict[str, Any]:
    """The fields of `samples.ABOUT`. commit: where git cannot tell. program: what the arguments were given to."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or _output("git", "rev-parse", "--short", "HEAD"),
        "command": command(sys.argv[1:], program),
    }


def _output(*words: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    return None
