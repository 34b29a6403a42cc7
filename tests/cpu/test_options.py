"""What a user may set: defaults, what is refused and with which words, and how options and modes go together."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from opara_backend import options
from opara_backend.options import ACCEPTED, Options, parse, without_effect
from opara_backend.scheduling.policies import order_names, policy_names

DEFAULTS: dict[str, Any] = {
    "policy": "auto",
    "launch_order": "opara",
    "streams": 8,
    "candidates": 8,
    "search_seconds": 2.0,
    "extra_memory": 64,
    "cuda_graph": True,
    "copy_outputs": True,
    "max_captures": 16,
    "fallback": "warn",
    "in_place": True,
    "fuse_convolutions": True,
    "fuse_depthwise": True,
    "fuse_gemv": True,
    "join_small": True,
    "merge_convolutions": False,
    "merge_products": True,
    "unfold_patches": True,
    "try_rewrites": False,
    "remember": True,
    "annotate": False,
}
ACCEPTABLE: dict[str, tuple[Any, ...]] = {
    "policy": ("auto", "opara", "nimble", "wavefront", "list_k", "just_in_time", "sequential"),
    "launch_order": ("opara", "critical_path", "program", "random"),
    "streams": (1, 128),
    "candidates": (1, 256),
    "search_seconds": (0.0, 0.5, 3600.0),
    "extra_memory": (0, 1 << 20),
    "cuda_graph": (True, False),
    "copy_outputs": (True, False),
    "max_captures": (1, 4096),
    "fallback": ("warn", "error"),
    "in_place": (True, False),
    "fuse_convolutions": (True, False),
    "fuse_depthwise": (True, False),
    "fuse_gemv": (True, False),
    "join_small": (True, False),
    "merge_convolutions": (True, False),
    "merge_products": (True, False),
    "try_rewrites": (True, False),
    "unfold_patches": (True, False),
    "remember": (True, False),
    "annotate": (True, False),
}


NAMES = {f.name for f in dataclasses.fields(Options)} - {"given"}


def refused(given: dict[Any, Any] | None, mode: str | None = None) -> str:
    """The words with which options are refused."""
    with pytest.raises(ValueError, match=r"option|mode") as raised:
        parse(given, mode)
    return str(raised.value)


def test_every_option_is_tested_here() -> None:
    assert set(DEFAULTS) == set(ACCEPTABLE) == set(ACCEPTED) == NAMES


def test_defaults() -> None:
    assert {name: getattr(Options(), name) for name in NAMES} == DEFAULTS
    assert Options().given == frozenset()
    assert parse(None, None) == parse({}, None) == (Options(), {})


def test_defaults_are_acceptable() -> None:
    assert parse(DEFAULTS, None) == (Options(), {})


@pytest.mark.parametrize("key", ACCEPTABLE)
def test_what_is_acceptable_is_taken_and_does_not_reach_inductor(key: str) -> None:
    for value in ACCEPTABLE[key]:
        chosen, passed = parse({key: value}, None)
        assert getattr(chosen, key) == value
        assert chosen == dataclasses.replace(Options(), **{key: value})
        assert chosen.given == {key}
        assert passed == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy", 1),
        ("policy", None),
        ("policy", ["opara"]),
        ("launch_order", True),
        ("streams", "8"),
        ("streams", 8.0),
        ("streams", True),
        ("streams", None),
        ("candidates", 2.5),
        ("candidates", False),
        ("search_seconds", "1"),
        ("search_seconds", True),
        ("cuda_graph", 1),
        ("cuda_graph", "yes"),
        ("copy_outputs", 0),
        ("copy_outputs", None),
        ("max_captures", True),
        ("max_captures", "many"),
        ("fallback", False),
        ("annotate", "yes"),
    ],
)
def test_a_wrong_type_is_refused_with_key_type_and_value(key: str, value: Any) -> None:
    words = refused({key: value})
    assert repr(key) in words
    assert f"of type {type(DEFAULTS[key]).__name__}" in words
    assert f"got {value!r} of type {type(value).__name__}" in words


def test_whole_seconds_are_seconds() -> None:
    assert parse({"search_seconds": 2}, None)[0].search_seconds == 2.0


@pytest.mark.parametrize(
    ("key", "value", "limits"),
    [
        ("streams", 0, "1 to 128"),
        ("streams", -1, "1 to 128"),
        ("streams", 129, "1 to 128"),
        ("candidates", 0, "1 to 256"),
        ("candidates", 257, "1 to 256"),
        ("search_seconds", -0.1, "0.0 to 3600.0"),
        ("search_seconds", 3601, "0.0 to 3600.0"),
        ("search_seconds", float("nan"), "0.0 to 3600.0"),
        ("max_captures", 0, "1 to 4096"),
        ("max_captures", 4097, "1 to 4096"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(key: str, value: float, limits: str) -> None:
    words = refused({key: value})
    assert repr(key) in words
    assert limits in words
    assert f"got {type(DEFAULTS[key])(value)}" in words


@pytest.mark.parametrize(
    ("key", "value", "choices", "hint"),
    [
        ("policy", "oprra", ("auto", *policy_names()), "did you mean 'opara'?"),
        ("policy", "Sequential", ("auto", *policy_names()), "did you mean 'sequential'?"),
        ("policy", "", ("auto", *policy_names()), ""),
        ("launch_order", "progam", order_names(), "did you mean 'program'?"),
        ("fallback", "ignore", ("warn", "error"), ""),
        ("fallback", "warning", ("warn", "error"), "did you mean 'warn'?"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_choices(
    key: str, value: str, choices: tuple[str, ...], hint: str
) -> None:
    words = refused({key: value})
    assert repr(key) in words
    assert f"takes one of {', '.join(choices)}, got {value!r}" in words
    assert hint in words
    assert hint or "did you mean" not in words


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("polcy", "policy"),
        ("stream", "streams"),
        ("cudagraph", "cuda_graph"),
        ("max_capture", "max_captures"),
        ("max_autotun", "max_autotune"),
        ("triton.cudagraph", "triton.cudagraphs"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, nearest: str) -> None:
    words = refused({key: True})
    assert f"unknown option {key!r}" in words
    assert f"did you mean {nearest!r}?" in words
    assert all(own in words for own in ACCEPTED)
    assert "torch._inductor.config" in words


@pytest.mark.parametrize("key", ["zzzzzz", "", 5, None])
def test_an_unknown_key_without_a_near_one_is_refused_all_the_same(key: Any) -> None:
    words = refused({key: True})
    assert f"unknown option {str(key)!r}" in words
    assert "did you mean" not in words


def test_one_wrong_option_among_right_ones_is_found() -> None:
    assert "'streams'" in refused({"policy": "opara", "max_autotune": True, "streams": 0})


def test_one_stream_runs_in_program_order_unless_another_is_asked_for() -> None:
    chosen, _ = parse({"policy": "sequential"}, None)
    assert chosen.order == "program"
    for policy, order in (("sequential", "opara"), ("nimble", "critical_path")):
        assert parse({"policy": policy, "launch_order": order}, None)[0].order == order
    assert parse({"policy": "nimble"}, None)[0].order == Options.launch_order


def test_hyphens_are_underscores_as_for_torch_compile() -> None:
    chosen, passed = parse({"launch-order": "program", "max-autotune": True}, None)
    assert chosen.launch_order == "program"
    assert passed == {"max_autotune": True}


# --- Inductor's own options ------------------------------------------------------------------------------------------


def test_inductors_options_pass_through() -> None:
    given = {"max_autotune": True, "triton.unique_kernel_names": False, "epilogue_fusion": True}
    assert parse({**given, "streams": 2}, None) == (Options(streams=2), given)


@pytest.mark.parametrize(("key", "value", "wanted"), [("max_autotune", "yes", "bool"), ("max_fusion_size", "8", "int")])
def test_inductors_options_are_checked_by_inductors_types(key: str, value: str, wanted: str) -> None:
    words = refused({key: value})
    assert repr(key) in words
    assert f"takes a {wanted}, got {value!r} of type str" in words


def test_a_mode_sets_what_inductor_sets_for_it() -> None:
    for mode, passed in torch._inductor.list_mode_options().items():
        assert parse(None, mode) == (Options(), passed)


def test_options_prevail_over_the_mode() -> None:
    mode = "max-autotune-no-cudagraphs"
    assert torch._inductor.list_mode_options(mode)["max_autotune"] is True
    chosen, passed = parse({"max_autotune": False, "max_fusion_size": 8, "streams": 3}, mode)
    assert chosen == Options(streams=3)
    assert passed == {**torch._inductor.list_mode_options(mode), "max_autotune": False, "max_fusion_size": 8}


def test_parsing_changes_neither_what_was_given_nor_inductors_modes() -> None:
    given, modes = {"streams": 3, "max_autotune": False}, torch._inductor.list_mode_options()
    parse(given, "max-autotune")
    assert given == {"streams": 3, "max_autotune": False}
    assert torch._inductor.list_mode_options() == modes


@pytest.mark.parametrize(("mode", "hint"), [("max-autotun", "did you mean 'max-autotune'?"), ("", ""), ("fast", "")])
def test_an_unknown_mode_is_refused_with_those_there_are(mode: str, hint: str) -> None:
    words = refused(None, mode)
    assert f"unknown mode {mode!r}" in words
    assert all(known in words for known in torch._inductor.list_mode_options())
    assert hint in words


def test_torch_compile_says_so_when_the_model_is_first_called() -> None:
    compiled = torch.compile(torch.nn.ReLU(), backend="opara", options={"polcy": "opara"})
    with pytest.raises(Exception, match="did you mean 'policy'"), torch.no_grad():
        compiled(torch.ones(2))


# --- the options under way -------------------------------------------------------------------------------------------


def test_current_options_are_those_of_the_innermost_compilation_of_this_thread() -> None:
    def current() -> Options:
        return options.current().options

    assert current() == Options()
    with options.using(Options(streams=2)):
        with pytest.raises(ZeroDivisionError), options.using(Options(streams=3)):
            1 // (current().streams - 3)
        assert current().streams == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(current).result() == Options()
    assert current() == Options()


def test_options_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().streams = 2  # type: ignore[misc]


@pytest.mark.parametrize("given", ["policy", ["policy"], 3])
def test_options_that_are_no_dict(given: Any) -> None:
    assert "options takes a dict" in refused(given)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"launch_order": "program"}, ["launch_order"]),
        ({"launch-order": "program", "policy": "auto"}, ["launch_order"]),
        ({"launch_order": "program", "policy": "opara"}, []),
        ({"candidates": 3, "policy": "opara"}, ["candidates"]),
        ({"candidates": 3, "search_seconds": 2.0, "policy": "nimble"}, ["candidates", "search_seconds"]),
        ({"extra_memory": 64, "policy": "sequential"}, ["extra_memory"]),
        ({"candidates": 3, "search_seconds": 2.0, "extra_memory": 0}, []),
        (None, []),
    ],
)
def test_options_without_effect_are_named(given: dict[str, Any] | None, named: list[str]) -> None:
    notes = without_effect(given)
    assert [note.split("'")[1] for note in notes] == named
    assert all("policy" in note for note in notes)
