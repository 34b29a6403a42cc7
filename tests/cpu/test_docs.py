"""What README and docs show is run: Python blocks as they stand, commands through their own entry points.

`tests.documentation` says how blocks are marked. Blocks of one page share a namespace, as a reader's session would;
README's model stands for the reader's own. Without a GPU, calls of `.cuda()` and `.half()` are left out.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opara_backend.__main__ import main
from tests.documentation import PAGES, ROOT, Block, all_blocks, blocks

GPU = torch.cuda.is_available()
OWN_TESTS = ("docs/troubleshooting.md",)  # `test_troubleshooting` runs it
PYTHON = [b for b in all_blocks("python") if b.page not in OWN_TESTS and not b.mark.startswith(("file ", "with "))]
COMMANDS = [(block, line) for block in all_blocks("bash") for line in block.text.splitlines() if line.strip()]


LONG = ("explain opara_backend.demo.googlenet",)  # compiles for a minute


def marks(mark: str) -> tuple[Any, ...]:
    if mark == "gpu":
        return (pytest.mark.skipif(not GPU, reason="needs a GPU"),)
    return (pytest.mark.slow,) if mark == "slow" else ()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page's programs write does not stay in the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a reader has, by page."""
    return {}


@pytest.mark.parametrize("block", [pytest.param(b, marks=marks(b.mark), id=str(b)) for b in PYTHON])
def test_python(block: Block, readers: dict[str, dict[str, Any]]) -> None:
    class MyModel(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([(x @ x).relu(), (x @ x.T).tanh()])

    given = {"__name__": "__main__", "MyModel": MyModel, "x": torch.ones(4, 4)}
    if GPU:
        given["x"] = torch.ones(4, 4, device="cuda", dtype=torch.float16)
    names = readers.setdefault(block.page, given)
    exec(block.compiled(block.text if GPU else block.text.replace(".cuda()", "").replace(".half()", "")), names)


def test_every_language_is_one_that_is_tested() -> None:
    assert {block.language for page in PAGES for block in blocks(page)} <= {"python", "bash"}


@pytest.mark.parametrize(
    ("block", "line"),
    [
        pytest.param(b, line, marks=marks("slow" if any(x in line for x in LONG) else b.mark), id=f"{b}-{line[:40]}")
        for b, line in COMMANDS
    ],
)
def test_command(block: Block, line: str) -> None:
    if "tox -e" in line:  # CI runs them; here: that they are there
        assert_environments(line)
        return
    words = shlex.split(line)
    if words[:3] == ["python", "-m", "opara_backend"]:
        assert main(words[3:]) == 0
    elif words[:2] == ["python", "-m"] or words[0] == "python":
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    elif words[:2] == ["pip", "install"]:
        named = re.findall(r"\[([\w,]+)\]", words[-1])
        assert {extra for group in named for extra in group.split(",")} <= extras()
    else:
        raise AssertionError(f"{block}: nobody tests {line!r}")


def assert_environments(text: str) -> None:
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    known = {name.removeprefix("testenv:") for name in tox.sections()}
    named = {name for group in re.findall(r"tox -e ([\w,]+)", text) for name in group.split(",")}
    assert named <= known, named - known


def extras() -> set[str]:
    """The extras that setup.py offers."""
    found = re.search(r"extras_require=\{(.*?)\n    \},", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert found
    return set(re.findall(r'^        "(\w+)": \[', found[1], re.MULTILINE))


def test_commands_named_in_sentences_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        assert_environments(text)
        for command in re.findall(r"`python -m opara_backend (\w+)", text):
            with pytest.raises(SystemExit) as stopped:
                main([command, "--help"])
            assert stopped.value.code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files, and headings of files; `tox -e docs` builds the pages and checks once more."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    assert all(page.name in nav for page in PAGES if page.parent == ROOT / "docs")


def test_a_policy_in_an_installed_package(tmp_path: Path) -> None:
    """As the page has it: two files, made known to Python's metadata, and a program in a fresh process."""
    program = ""
    for block in blocks(ROOT / "docs" / "policies.md"):
        if block.mark.startswith("file "):
            (tmp_path / block.mark.removeprefix("file ")).write_text(block.text)
        elif block.mark.startswith("with "):
            program = block.text
    # As an editable installation leaves it, and without asking an index for build tools.
    setup = [sys.executable, "setup.py", "-q", "egg_info"]
    done = subprocess.run(setup, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    quick = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **quick}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
