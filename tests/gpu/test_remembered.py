"""A new process finds the schedule an earlier one chose, and does not search; what is spoilt is ignored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, sys, time
import torch
from torch import nn
from opara_backend.report.record import collect

torch.manual_seed(0)
chains = nn.ModuleList(nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256)) for _ in range(4)).cuda()

def model(x):
    return torch.cat([chain(x) for chain in chains], 1).softmax(1)

x = torch.randn(16, 256, device="cuda")
with torch.inference_mode(), collect() as records:
    call = torch.compile(model, backend="opara", options=json.loads(sys.argv[1]))
    agree = all(torch.allclose(call(x), model(x), rtol=1e-3, atol=1e-4) for _ in range(3))
(record,) = records
((plan, captured),) = record.plans.values()
print(json.dumps({
    "agree": agree, "captured": captured, "remembered": len(record.remembered), "replays": record.replays,
    "search": record.stages.search, "profile": record.stages.profile, "order": plan.schedule.order,
    "streams": plan.schedule.streams, "tried": len(record.candidates.get((), ())), "fallbacks": len(record.fallbacks),
}))
"""


def process(folder: Path, **options: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(options)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["agree"]
    assert found["captured"]
    assert found["replays"] == 2
    assert not found["fallbacks"]
    return found


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("caches")
    return folder, process(folder)


def test_the_second_process_does_not_search(filled: tuple[Path, dict[str, Any]]) -> None:
    folder, first = filled
    assert not first["remembered"]
    assert first["profile"] > 0
    second = process(folder)
    assert second["remembered"] == 1
    assert second["search"] == second["profile"] == 0
    assert (second["order"], second["streams"], second["tried"]) == (first["order"], first["streams"], first["tried"])


def test_other_options_search_for_themselves(filled: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = filled
    assert not process(folder, remember=False)["remembered"]
    assert not process(folder, policy="nimble")["remembered"]
    assert process(folder, policy="nimble")["remembered"]


@pytest.mark.parametrize("spoil", ["cut", "waits"])
def test_what_is_spoilt_is_searched_anew(tmp_path: Path, spoil: str) -> None:
    process(tmp_path, policy="opara")
    (path,) = (tmp_path / "opara").glob("*.json")
    text = path.read_text()
    if spoil == "cut":
        path.write_text(text[: len(text) // 2])
    else:  # of the right form, and not a valid schedule
        document = json.loads(text)
        document["schedule"]["waits"] = [[] for _ in document["schedule"]["waits"]]
        path.write_text(json.dumps(document))
    assert not process(tmp_path, policy="opara")["remembered"]
    assert process(tmp_path, policy="opara")["remembered"]
