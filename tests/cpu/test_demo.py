"""The command line, short of the demo itself, which takes a minute to compile: `tox -e demo` runs it."""

from __future__ import annotations

import pytest
import torch

from opara_backend.__main__ import main
from opara_backend.demo import run as demo


def test_no_compiler_is_said_plainly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["demo", "--device", "cpu"]) == 2
    assert "no-such-compiler" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu_is_said_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["demo", "--calls", "0"], ["demo", "--dtype", "int8"], ["dance"], []])
def test_wrong_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(wrong)
    assert stopped.value.code == 2


def test_disagreement_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With another model in GoogLeNet's place, compiled in a moment, whose result is then spoilt."""
    small = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(8)
    )
    image = torch.randn(1, 3, 224, 224)
    small(image)
    monkeypatch.setattr(demo, "googlenet", lambda seed: small.eval())
    monkeypatch.setattr(demo, "photograph", lambda: image)
    assert main(["demo", "--device", "cpu", "--calls", "2"]) == 0
    assert "time per call, opara" in capsys.readouterr().out
    monkeypatch.setattr(demo, "TOLERANCE", {torch.float32: -1.0})
    torch._dynamo.reset()
    assert main(["demo", "--device", "cpu", "--calls", "1"]) == 1
    assert "disagrees" in capsys.readouterr().out
