"""`python -m opara_backend cache`: what it counts as ours, and that clearing removes that and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opara_backend.__main__ import main
from opara_backend.commands.cache import MARK, NEWEST, survey
from opara_backend.lowering.inductor import _FOOTER
from opara_backend.options import REMEMBERED

Run = Callable[..., Any]

COMPILE = """
import json, os, pathlib
import torch

found = []
x = torch.ones(4, 4)
with torch.no_grad():
    for backend in ("inductor", "opara"):
        torch._dynamo.reset()
        torch.compile(lambda x: torch.cat([(x @ x).relu(), (x @ x.T).tanh()]), backend=backend)(x)
        found.append([str(p) for p in pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*") if p.is_file()])
print(json.dumps(found))
"""


def test_the_mark_is_in_every_module_we_generate() -> None:
    assert MARK in _FOOTER.encode()


def test_clear_removes_our_entries_and_only_those(
    run_python: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--directory", str(tmp_path)]
    others, everything = (set(map(Path, paths)) for paths in run_python(COMPILE, cache=tmp_path))
    own = set(survey(tmp_path).own_files)
    assert len(own) == 3
    assert own <= everything - others

    assert main(["cache", "list", "--json", *folder]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1
    assert document["location"] == str(tmp_path)
    (module,) = document["modules"]
    assert module["kernels"] >= 3
    assert document["index_entries"] == 2  # one of Inductor's, one of AOTAutograd's
    assert 0 < document["own_bytes"] < document["bytes"]

    assert main(["cache", "clear", *folder]) == 2  # nobody to ask
    assert "--yes" in capsys.readouterr().err
    assert Path(module["path"]).exists()

    assert main(["cache", "clear", "--yes", *folder]) == 0
    assert "removed 3 files" in capsys.readouterr().out
    assert not Path(module["path"]).exists()
    assert all(path.exists() for path in others)
    assert survey(tmp_path).own_files == ()
    assert main(["cache", "clear", *folder]) == 0
    assert "nothing of this backend" in capsys.readouterr().out


def _fill(folder: Path, graphs: int) -> None:
    for number in range(graphs):
        module = folder / f"{number:02}" / f"c{number}.py"
        module.parent.mkdir()
        module.write_text(f"def program():\n    def k0():\n        pass\n{MARK.decode()})\n")


def test_schedules_that_won_are_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    won, other = tmp_path / REMEMBERED / "abc.json", tmp_path / "abc.json"
    won.parent.mkdir()
    for path in (won, other):
        path.write_text("{}")
    folder = ["--directory", str(tmp_path)]
    assert main(["cache", "list", *folder]) == 0
    assert "1 schedules" in capsys.readouterr().out
    assert main(["cache", "clear", "--yes", *folder]) == 0
    assert other.exists()
    assert not won.parent.exists()


def test_a_long_list_is_cut_unless_all_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _fill(tmp_path, NEWEST + 5)
    assert main(["cache", "list", "--directory", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "and 5 older ones" in printed
    assert f"{NEWEST + 5} modules" in printed
    assert main(["cache", "list", "--all", "--directory", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(".py") == NEWEST + 5
    assert "older" not in printed


@pytest.mark.parametrize(("answer", "code", "left"), [("y", 0, 0), ("n", 1, 2), ("", 1, 2)])
def test_clear_asks(answer: str, code: int, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path, 2)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert main(["cache", "clear", "--directory", str(tmp_path)]) == code
    assert len(list(tmp_path.rglob("*.py"))) == left
    assert len(list(tmp_path.iterdir())) == left  # folders left empty go, too


@pytest.mark.parametrize("wrong", [["cache"], ["cache", "burn"], ["cache", "list", "--directory", "/no/such/folder"]])
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(wrong)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err
