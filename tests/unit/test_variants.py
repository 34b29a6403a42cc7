"""Backends by name, and the command that measures the same again."""

from __future__ import annotations

import pytest

from bench.about import command, environment
from bench.samples import ABOUT
from bench.variants import PAPER, accepted, unfused_options, variant
from opara_backend.options import REWRITES


@pytest.mark.parametrize("name", accepted())
def test_every_name_that_is_accepted_is_known(name: str) -> None:
    assert variant(name).name == name


@pytest.mark.parametrize(
    ("name", "options", "unfused"),
    [
        ("opara", {}, False),
        ("opara:nimble", {"policy": "nimble"}, False),
        ("opara:candidates=28", {"candidates": 28}, False),
        ("opara:policy=opara,launch_order=program", {"policy": "opara", "launch_order": "program"}, False),
        ("opara:list_k,streams=4,copy_outputs=False", {"policy": "list_k", "streams": 4, "copy_outputs": False}, False),
        ("opara:paper", PAPER, False),
        ("opara:paper-unfused", PAPER, True),
        ("opara:paper-unfused,launch_order=program", {**PAPER, "launch_order": "program"}, True),
        ("opara:unfused", {}, True),
        ("opara:search_seconds=0.5", {"search_seconds": 0.5}, False),
    ],
)
def test_what_a_name_stands_for(name: str, options: dict[str, object], unfused: bool) -> None:
    found = variant(name)
    assert (found.options, found.unfused) == (options, unfused)
    assert found.kernels == ("opara-unfused" if unfused else "opara")


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("opara:nimble,freezing=True", "opara-freezing=True"),
        ("opara:paper-unfused,freezing=True,streams=4", "opara-unfused-freezing=True"),
        ("reduce-overhead:freezing=True", "reduce-overhead-freezing=True"),
        ("inductor", "inductor"),
    ],
)
def test_inductors_options_make_other_kernels(name: str, kernels: str) -> None:
    assert variant(name).options.get("freezing", False) is ("freezing" in name)
    assert variant(name).kernels == kernels


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("reduce-overhead:streams=4", "streams is an option of opara's"),
        ("inductor:frezing=True", "did you mean 'freezing'"),
        ("inductor:fast", "unknown backend"),
        ("nonesuch", "unknown backend 'nonesuch'; accepted: eager, cudagraph, dynamo, inductor"),
        ("eager:fast", "unknown backend"),
        ("dynamo:fast", "unknown backend"),
        ("opara:rammer", "unknown policy 'rammer'"),
        ("opara:streams=many", "'streams'"),
        ("opara:steams=4", "did you mean 'streams'"),
    ],
)
def test_a_wrong_name_is_told_at_once(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        variant(name)


def test_rewrites_make_other_kernels() -> None:
    plain, sequential = variant("opara:plain"), variant("opara:sequential,plain,streams=2")
    assert plain.options == dict.fromkeys(REWRITES, False)
    assert sequential.options == {**plain.options, "policy": "sequential", "streams": 2}
    assert plain.kernels == sequential.kernels
    kernels = {variant(name).kernels for name in ("opara", "opara:plain", "opara:fuse_gemv=False")}
    assert len(kernels | {variant("opara:try_rewrites=True").kernels}) == 4


def test_unfused_is_inductors_own_mode_without_rewrites() -> None:
    assert unfused_options(False) == {}
    assert unfused_options()["fallback_by_default"] is True
    assert not any(unfused_options()[name] for name in REWRITES)


def test_the_command_names_no_place() -> None:
    words = ["run", "--out", "/some/where.json", "--models", "a", "--record=/else", "--commit", "abc", "--small"]
    assert command(words) == "python -m bench run --models a --small"
    assert set(environment("abc")) == set(ABOUT)
    assert environment("abc")["commit"] == "abc"
