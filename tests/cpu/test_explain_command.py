"""`python -m opara_backend explain`: what it writes, and how it says that an argument is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opara_backend.__main__ import main
from opara_backend.report.model import Report

HERE = "tests.cpu.test_explain_command"


def small() -> tuple[nn.Module, tuple[Tensor]]:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), (torch.zeros(2, 8),)


def raises() -> tuple[nn.Module, tuple[Tensor]]:
    return nn.Linear(3, 3), (torch.zeros(2, 8),)


def not_a_pair() -> nn.Module:
    return nn.Linear(3, 3)


def too_many() -> tuple[Any, ...]:
    return nn.Linear(3, 3), 1, 2, 3


def a_list() -> tuple[Any, ...]:
    return nn.Linear(3, 3), [torch.zeros(3)]


def no_dict() -> tuple[Any, ...]:
    return nn.Linear(3, 3), (torch.zeros(3),), 7


class Encoder(nn.Module):
    """Called as transformers' models are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor | None = None, mask: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        assert input_ids is not None
        assert mask is not None
        return {"logits": self.out(self.embed(input_ids)) * mask}


def by_keyword() -> tuple[nn.Module, dict[str, Tensor]]:
    return Encoder().eval(), {"input_ids": torch.arange(6).reshape(2, 3), "mask": torch.ones(2, 3, 1)}


def both_ways() -> tuple[nn.Module, tuple[Tensor], dict[str, Tensor]]:
    model, inputs = by_keyword()
    return model, (inputs.pop("input_ids"),), inputs


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
        ([f"{HERE}:too_many"], "returned a tuple of 4; accepted: "),
        ([f"{HERE}:a_list"], "returned a list of inputs; accepted: "),
        ([f"{HERE}:no_dict"], "returned a int for keyword inputs"),
        (["./nowhere.py:small"], "there is no file nowhere.py"),
        (["..tests:small"], "is relative; accepted: "),
        ([f"{HERE}:small", "--html", "."], ". is a folder"),
        ([f"{HERE}:small", "--option", "streams"], "accepted: KEY=VALUE"),
        ([f"{HERE}:small", "--option", "streams=0"], "takes 1 to 128, got 0"),
        ([f"{HERE}:small", "--option", "stream=4"], "did you mean 'streams'?"),
        ([f"{HERE}:small", "--device", "toaster"], "accepted: cpu, cuda, cuda:N"),
        ([f"{HERE}:small", "--device", "cuda:99"], "this torch sees"),
        ([f"{HERE}:small", "--policy", "best"], "takes one of auto, opara"),
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


@pytest.mark.parametrize("factory", ["by_keyword", "both_ways"])
def test_inputs_by_keyword_and_options(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--device", "cpu", "--option", "streams=3", "--option", "max_fusion_size=4"]
    assert main(["explain", f"{HERE}:{factory}", *given]) == 0
    out = capsys.readouterr().out
    assert "opara: Encoder" in out
    assert "max_fusion_size=4, streams=3" in out


MODEL_FILE = """
import torch
from beside import WIDTH

class Model(torch.nn.Linear):
    pass

def make():
    return Model(WIDTH, 2).eval(), torch.zeros(1, WIDTH)
"""


def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "a_model_file.py").write_text(MODEL_FILE)
    (tmp_path / "beside.py").write_text("WIDTH = 5")
    assert main(["explain", f"{tmp_path}/a_model_file.py:make", "--device", "cpu"]) == 0
    assert "opara: Model" in capsys.readouterr().out
    (tmp_path / "broken.py").write_text("1 / 0")
    assert main(["explain", f"{tmp_path}/broken.py:make"]) == 1
    assert f"importing {tmp_path}/broken.py raised the exception above" in capsys.readouterr().err


def test_one_file_that_cannot_be_written_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Report, path: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Report, "save_html", full)
    files = ["--html", str(tmp_path / "a.html"), "--json", str(tmp_path / "a.json")]
    assert main(["explain", f"{HERE}:small", "--device", "cpu", *files]) == 1
    assert "a.html could not be written: No space left on device" in capsys.readouterr().err
    assert (tmp_path / "a.json").exists()
