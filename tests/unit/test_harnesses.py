"""The commands for other people's harnesses name a backend that torch knows, and options that it takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from opara_backend.options import parse

TEXT = (Path(__file__).parent.parent.parent / "bench" / "harnesses" / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_backend_is_one_that_torch_lists(command: str) -> None:
    """As the harnesses check it: `benchmarks/dynamo` takes no other name."""
    words = shlex.split(command)
    named = [words[i + 1] for i, word in enumerate(words) if word in ("--backend", "--torchcompile")]
    named += [word.rpartition("=")[2] for word in words if word.startswith("+backend.torch_compile_config.backend=")]
    assert len(named) == 1
    assert named[0] in torch._dynamo.list_backends(exclude_tags=None)


def test_what_the_harnesses_pass_on_is_accepted() -> None:
    """timm passes `mode=None` beside the name; optimum-benchmark the dictionary as it stands."""
    parse(None, None)
    assert parse({"policy": "nimble"}, None)[0].policy == "nimble"
    assert {"opara", "inductor"} <= set(torch._dynamo.list_backends(exclude_tags=None))
