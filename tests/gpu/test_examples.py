"""The examples at full size, and what the documentation shows and needs a GPU for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from opara_backend.fallback import FallbackReason
from tests.cpu import test_troubleshooting as troubleshooting
from tests.documentation import ROOT, all_blocks

EXAMPLES = ("classifier", "decode", "encoder", "recommender", "server")


def run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    for needed in {"server": ("fastapi", "httpx")}.get(name, ()):
        pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'opara-backend[examples]'")
    printed = run(f"examples/{name}.py")
    assert "captured in one CUDA Graph" in printed
    assert "fallback" not in printed


def test_doctor() -> None:
    printed = run("-m", "opara_backend", "doctor")
    assert "captured in a CUDA Graph" in printed
    assert "all is well" in printed


@pytest.mark.parametrize("reason", FallbackReason, ids=lambda reason: reason.value)
def test_the_troubleshooting_program_shows_its_reason(reason: FallbackReason) -> None:
    block = troubleshooting.PROGRAMS[reason.value]
    if block.mark not in ("", "gpu") and not (block.mark == "needs two GPUs" and torch.cuda.device_count() > 1):
        pytest.skip(block.mark)
    assert troubleshooting.run(block) == {reason.value: 1}


COMMANDS = [line for block in all_blocks("bash") if block.mark == "gpu" for line in block.text.splitlines()]


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line: str) -> None:
    program, *arguments = line.split()
    assert program == "python"
    run(*arguments)
