"""The paper's claims: ratios from results, and what is missing with the command that measures it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import paper
from bench.__main__ import main
from bench.campaign import backends_of
from bench.paper import CLAIMS, FUSED, MODELS, NOT_MEASURED, UNFUSED, all_rows, missing, ratios, span
from bench.samples import ABOUT, Results, Row, Samples, save
from bench.variants import variant

SECONDS = {"eager": 8.0, "cudagraph": 3.0, UNFUSED: 2.0, FUSED: 1.0, "opara": 0.5, "opara:nimble": 1.5}


def results(models: tuple[str, ...] = ("googlenet",)) -> Results:
    rows = [
        Row(model, "float16", 1, name, Samples((s,), (s,), (s,)), 0.0, 1.0, profile_seconds=0.004)
        for model in models
        for name, s in SECONDS.items()
    ]
    return Results(dict.fromkeys(ABOUT, "x"), tuple(rows))


def test_ratios_on_both_kinds_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "scheduling_times", lambda recordings: [])
    rows = {row[0]: row[1:] for row in all_rows([results()])}
    assert rows["against PyTorch eager"] == (
        "1.80x to 10.97x",
        "8.00x to 8.00x (googlenet float16)",
        "4.00x to 4.00x (googlenet float16)",
    )
    assert rows["against Nimble's policy"][1:] == ("1.50x to 1.50x (googlenet float16)", "missing")
    assert rows["the paper's setting over ours (policy auto)"][1].startswith("4.00x")
    assert rows["profiling overhead"] == ("4.25 ms", "4.0 ms", "4.0 ms")
    assert {text for text, *_ in NOT_MEASURED} <= rows.keys()


def test_only_the_claims_own_models_and_batches_count() -> None:
    found = results(("googlenet", "resnet50"))
    assert {case[0] for case in ratios([found], CLAIMS[0], "eager", FUSED)} == {"googlenet"}
    assert ratios([found], CLAIMS[-1], "cudagraph", FUSED) == {}
    assert span({}) == "missing"


def test_a_campaign_measures_every_claim() -> None:
    for claim in CLAIMS:
        for name in (claim.fused, claim.unfused, FUSED, UNFUSED, "opara"):
            assert variant(name).name == name
            for model in claim.models:
                for batch in claim.batches:
                    assert name in backends_of(model, batch, on_gpu=True)


def test_what_is_missing_comes_with_its_command() -> None:
    one, thirty_two = missing([])
    assert set(MODELS) <= set(one.split())
    assert "--batches 1 " in one
    assert "--models inception_v3 --batches 32" in thirty_two
    named = [n for n in missing([results(MODELS)])[0].split() if n in MODELS]
    assert "googlenet" in named  # its rivals' policies on unfused kernels are not there


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    save(path, results())
    assert main(["paper", str(path), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert "| against PyTorch eager | 1.80x to 10.97x | 8.00x to 8.00x (googlenet float16) |" in shown
    assert "| time of Algorithm 1, bert_base | 0.58 ms |" in shown
    assert "missing; measure it on a GPU with: python -m bench campaign" in shown
    assert main(["paper", str(tmp_path / "none.json")]) == 2
