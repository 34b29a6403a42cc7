"""What the README says that can be checked without running a model."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def test_commands_name_environments_that_exist() -> None:
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    environments = {name.removeprefix("testenv:") for name in tox.sections()}
    named = set(re.findall(r"tox -e ([\w-]+)", README))
    assert {"demo", "test"} <= named <= environments


def test_ci_calls_the_test_command() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"tox -e [\w,]*\btest\b", ci)
