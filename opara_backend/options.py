"""What a user may set: name, type, default, meaning, check.

Takes: the `options=` and `mode=` of torch.compile. Gives: a checked `Options` and the Inductor options that pass
through. Must not change: Inductor's configuration. Errors: ValueError naming the key, what was given, what is
accepted and the nearest valid name.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from opara_backend.scheduling.launch_order import LAUNCH_ORDERS
from opara_backend.scheduling.streams import STREAM_POLICIES


@dataclass(frozen=True)
class Options:
    """Our own options; every one can be given in `torch.compile(..., backend="opara", options={...})`."""

    policy: str = "opara"
    launch_order: str = "opara"
    streams: int = 8
    cuda_graph: bool = True
    copy_outputs: bool = True
    max_captures: int = 16
    fallback: str = "warn"


@dataclass(frozen=True)
class _Accepts:
    """What a key takes: one of `choices`, or a number between `low` and `high`, or a bool."""

    meaning: str
    choices: tuple[str, ...] = ()
    low: int = 0
    high: int = 0


ACCEPTED: Mapping[str, _Accepts] = {
    "policy": _Accepts("stream allocation", tuple(STREAM_POLICIES)),
    "launch_order": _Accepts("launch order", tuple(LAUNCH_ORDERS)),
    "streams": _Accepts("at most this many CUDA streams", low=1, high=128),
    "cuda_graph": _Accepts("capture into a CUDA Graph and replay it"),
    "copy_outputs": _Accepts("give the caller outputs of its own; False hands out memory the next call overwrites"),
    "max_captures": _Accepts("captured graphs kept per compiled graph, least recently used evicted", low=1, high=4096),
    "fallback": _Accepts("what a step down the ladder does", ("warn", "error")),
}

_current: contextvars.ContextVar[Options | None] = contextvars.ContextVar("opara_options", default=None)


def current() -> Options:
    """The options of the compilation under way in this context, or the defaults."""
    return _current.get() or Options()


@contextlib.contextmanager
def using(options: Options) -> Iterator[None]:
    """Make `options` the current ones while the block runs."""
    token = _current.set(options)
    try:
        yield
    finally:
        _current.reset(token)


def parse(options: Mapping[str, Any] | None, mode: str | None) -> tuple[Options, dict[str, Any]]:
    """Split `options` into ours, checked, and Inductor's, checked against Inductor's own types.

    `mode` is one of Inductor's (`reduce-overhead`, `max-autotune`, ...): what it sets passes through, except that
    CUDA Graphs are ours.
    """
    from opara_backend import upstream

    given = dict(options or {})
    own = {key: _check(key, given.pop(key)) for key in list(given) if key in ACCEPTED}
    known = upstream.inductor_option_names()
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ValueError(_unknown(key, (*ACCEPTED, *known)))
        upstream.check_inductor_option(name, value)
    passed = {key.replace("-", "_"): value for key, value in given.items()}
    if mode is not None:
        try:
            passed = {**upstream.list_mode_options(mode), **passed}
        except RuntimeError as error:
            raise ValueError(f"mode {mode!r} is unknown: {error}") from error
    return Options(**own), passed


def _check(key: str, value: Any) -> Any:
    accepts = ACCEPTED[key]
    default = next(f.default for f in fields(Options) if f.name == key)
    if type(value) is not type(default):
        wanted = type(default).__name__
        raise ValueError(
            f"option {key!r} ({accepts.meaning}) takes a {wanted}, got {value!r} of type {type(value).__name__}"
        )
    if accepts.choices and value not in accepts.choices:
        raise ValueError(
            f"option {key!r} ({accepts.meaning}) takes one of {', '.join(accepts.choices)}, got {value!r}"
            + _nearest(value, accepts.choices)
        )
    if accepts.high and not accepts.low <= value <= accepts.high:
        raise ValueError(f"option {key!r} ({accepts.meaning}) takes {accepts.low} to {accepts.high}, got {value}")
    return value


def _unknown(key: str, known: tuple[str, ...]) -> str:
    return f"unknown option {key!r}; accepted: {', '.join(ACCEPTED)}, or any key of torch._inductor.config" + _nearest(
        key, known
    )


def _nearest(given: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
