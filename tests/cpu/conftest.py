"""What the tests that compile on the CPU share: comparing with eager twins, and Python in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.agreement import Agree, agreement


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """Every test compiles from scratch (Inductor's caches on disk stay) and starts from one random state."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def agree() -> Agree:
    """Check that a compiled model does what its eager twin does, call after call, and that our path did it."""
    return agreement(captured=False)


@pytest.fixture(scope="session")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Run source text in a fresh interpreter; what its last line of output says, read as JSON."""
    folder = tmp_path_factory.mktemp("processes")
    # In an empty cache directory, precompiling headers takes longer than it saves.
    quick = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}

    def run(
        source: str, *arguments: str, cache: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> Any:
        folders = {"TORCHINDUCTOR_CACHE_DIR": str(cache)} if cache is not None else {}
        script = folder / "script.py"
        script.write_text(source)
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **quick, **folders, **(environment or {})},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
