"""`python -m opara_backend explain`: what it writes, and how it says that an argument is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from opara_backend.__main__ import main

HERE = "tests.cpu.test_explain_command"


def small() -> tuple[nn.Module, tuple[Tensor]]:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), (torch.zeros(2, 8),)


def raises() -> tuple[nn.Module, tuple[Tensor]]:
    return nn.Linear(3, 3), (torch.zeros(2, 8),)


def not_a_pair() -> nn.Module:
    return nn.Linear(3, 3)


def fails_itself() -> None:
    raise OSError("no weights")


def test_it_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("html", "trace", "json")}
    arguments = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    assert (
        main(["explain", f"{HERE}:small", "--device", "cpu", "--dtype", "float32", "--policy", "opara", *arguments])
        == 0
    )
    out = capsys.readouterr().out
    assert "opara: Sequential" in out
    assert all(f"wrote {path}" in out for path in files.values())
    assert json.loads(files["json"].read_text())["options"] == [["policy", "opara"]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "MODULE:FACTORY, as in opara_backend.demo.googlenet:example"),
        (["no_such_module:f"], "no module named 'no_such_module'"),
        ([f"{HERE}:smal"], "it has: "),
        ([f"{HERE}:HERE"], "is a str, not a function"),
        ([f"{HERE}:not_a_pair"], "returned a Linear; accepted: (model, tuple of inputs)"),
        ([f"{HERE}:small", "--device", "toaster"], "accepted: cpu, cuda, cuda:N"),
        ([f"{HERE}:small", "--device", "cuda:99"], "this torch sees"),
        ([f"{HERE}:small", "--policy", "best"], "accepted: auto, opara"),
        ([f"{HERE}:small", "--html", "/no/such/folder/x.html"], "there is no folder"),
    ],
)
def test_a_wrong_argument_is_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"), [("raises", "the model, or its compilation"), ("fails_itself", "no weights")]
)
def test_a_model_that_raises_is_1(name: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{HERE}:{name}", "--device", "cpu"]) == 1
    assert says in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["explain", "--help"])
    assert left.value.code == 0
    assert "opara_backend.demo.googlenet:example" in capsys.readouterr().out
