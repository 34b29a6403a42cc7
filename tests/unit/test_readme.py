"""README and docs: generated parts are those that results and options give, and commands exist."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

from bench.readme import PAGES, renewed

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert renewed(text) == text, "run `python -m bench readme`"
    assert ("| `annotate` |" if page.name != "results.md" else "| geometric mean |") in text


def test_commands_name_environments_that_exist() -> None:
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    environments = {name.removeprefix("testenv:") for name in tox.sections()}
    named = set(re.findall(r"tox -e ([\w-]+)", README))
    assert {"demo", "test"} <= named <= environments


def test_ci_calls_the_test_command() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"tox -e [\w,]*\btest\b", ci)


def test_a_marker_may_name_a_dtype_or_a_batch() -> None:
    path = "bench/results/h200-whole.json"
    for only, first in (("", " 1 "), (" 32", " 32 "), (" float32", " 1 ")):
        made = renewed(f"<!-- policies: {path}{only} -->\n<!-- end of results -->")
        assert f"| model, batch{first}|" in made
        assert ("float16 |" in made) == (only != " float32")
