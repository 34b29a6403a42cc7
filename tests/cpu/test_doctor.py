"""`python -m opara_backend doctor`: what it says of a machine that is well, and of each thing that may be missing."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any

import pytest
import torch

from opara_backend.__main__ import main
from opara_backend.commands import checks
from opara_backend.commands.checks import BROKEN, OK, Finding
from opara_backend.lowering.sorting import Unsupported

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")


@CPU_ONLY
def test_a_machine_without_a_gpu_is_well_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1
    assert document["ok"]
    found = {f["name"]: f for f in document["findings"]}
    assert found["torch"]["text"].startswith(torch.__version__)
    assert "no CUDA device" in found["device"]["text"]
    assert "runs in order" in found["trial on cpu"]["text"]
    assert "opara_backend.backend:opara" in found["entry point"]["text"]
    assert "MiB" in found["cache"]["text"] or "KiB" in found["cache"]["text"]


def test_what_is_broken_is_an_exit_code_and_comes_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Finding("torch", OK, "fine"), Finding("sun", BROKEN, "does not shine [today]", "wait")]
    monkeypatch.setattr(checks, "findings", lambda: iter(found))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "does not shine [today]" in printed
    assert "wait" in printed
    assert "broken: sun" in printed
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_tables_need_no_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(checks, "findings", lambda: iter([Finding("torch", OK, "fine")]))
    assert main(["doctor"]) == 0
    assert "torch  ok      fine" in capsys.readouterr().out


@CPU_ONLY
def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = checks._compiler()
    assert found.status == BROKEN
    assert "no-such-compiler" in found.text
    assert "CXX" in found.remedy


def test_a_switch_that_turns_compilation_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    found = checks._switched_off()
    assert found.status == BROKEN
    assert "TORCHDYNAMO_DISABLE=1" in found.text


def test_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    found = checks._entry_point()
    assert found.status == BROKEN
    assert "pip install" in found.remedy


def test_another_package_has_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    other = importlib.metadata.EntryPoint("opara", "json:loads", "torch_dynamo_backends")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: (other,))
    found = checks._entry_point()
    assert found.status == BROKEN
    assert "json:loads" in found.text


def test_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu126")
    found = checks._torch()
    assert found.status == BROKEN
    assert "2.11" in found.remedy


def test_a_fallback_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a lowering fails: the model works, by stock Inductor, and the doctor says that it is not ours."""

    def refuse(*_: Any) -> None:
        raise Unsupported("a line of a kind nobody knows")

    monkeypatch.setattr("opara_backend.lowering.inductor.OparaWrapperCodegen.rewrite", refuse)
    with torch._inductor.config.patch(force_disable_caches=True):
        found = checks.trial("cpu")
    assert found.status == BROKEN
    assert "unsupported_lowering" in found.text
    assert "report" in found.remedy


def test_a_trial_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr("opara_backend.upstream.compile_fx", fail)
    found = checks.trial("cpu")
    assert found.status == BROKEN
    assert "no compiler" in found.text
