"""What a user may set: name, type, default, meaning, check.

Takes: the `options=` and `mode=` of torch.compile. Gives: a checked `Options` and the Inductor options that pass
through. Must not change: Inductor's configuration. Errors: ValueError naming the key, what was given, what is
accepted and the nearest valid name.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opara_backend.scheduling import policies

REWRITES = (
    "fuse_convolutions",
    "fuse_depthwise",
    "fuse_gemv",
    "join_small",
    "merge_convolutions",
    "merge_products",
    "unfold_patches",
)
"""Options that change which kernels there are, and so what the caches hold."""

REMEMBERED = "opara"  # folder in Inductor's cache directory of what option `remember` keeps


@dataclass(frozen=True)
class Options:
    """Our own options; every one can be given in `torch.compile(..., backend="opara", options={...})`.

    given: the names of those that were, `given` itself excepted, which nobody gives.
    """

    policy: str = "auto"
    launch_order: str = "opara"
    streams: int = 8
    candidates: int = 8
    search_seconds: float = 2.0
    extra_memory: int = 64
    cuda_graph: bool = True
    copy_outputs: bool = True
    max_captures: int = 16
    fallback: str = "warn"
    in_place: bool = True
    fuse_convolutions: bool = True
    fuse_depthwise: bool = True
    fuse_gemv: bool = True
    join_small: bool = True
    merge_convolutions: bool = False
    merge_products: bool = True
    unfold_patches: bool = True
    try_rewrites: bool = False
    remember: bool = True
    annotate: bool = False
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    @property
    def order(self) -> str:
        """The launch order of a policy by name. On one stream nothing runs beside anything, and an order that nobody
        asked for would only take memory: there it is the program's."""
        return "program" if self.policy == "sequential" and "launch_order" not in self.given else self.launch_order


@dataclass(frozen=True)
class _Accepts:
    """What a key takes: one of `choices()`, or a number between `low` and `high`, or a bool."""

    meaning: str
    choices: Callable[[], tuple[str, ...]] | None = None
    low: float = 0
    high: float = 0


ACCEPTED: Mapping[str, _Accepts] = {
    "policy": _Accepts(
        "stream allocation; auto tries several and keeps the best", lambda: ("auto", *policies.policy_names())
    ),
    "launch_order": _Accepts("launch order, where a policy is named; with sequential `program`", policies.order_names),
    "streams": _Accepts("at most this many CUDA streams", low=1, high=128),
    "candidates": _Accepts("schedules tried on the GPU with policy auto, one stream included", low=1, high=256),
    "search_seconds": _Accepts(
        "about how long profiling and trying them may take; up to three are tried anyway", low=0.0, high=3600.0
    ),
    "extra_memory": _Accepts(
        "MiB that a schedule tried may take beyond a tenth more than one stream takes, model and workspaces included",
        low=0,
        high=1 << 20,
    ),
    "cuda_graph": _Accepts("capture into a CUDA Graph and replay it"),
    "copy_outputs": _Accepts("give the caller outputs of its own; False hands out memory the next call overwrites"),
    "max_captures": _Accepts("captured graphs kept per compiled graph, least recently used evicted", low=1, high=4096),
    "fallback": _Accepts("what a step down the ladder does", lambda: ("warn", "error")),
    "in_place": _Accepts("let a kernel write over an input that no other kernel needs any more"),
    "fuse_convolutions": _Accepts("convolutions with batch norm, residual and ReLU as one cuDNN kernel, on CUDA"),
    "fuse_depthwise": _Accepts("depthwise convolutions as fused Triton kernels instead of cuDNN calls, on CUDA"),
    "fuse_gemv": _Accepts("products of one row or column as fused Triton reductions instead of cuBLAS calls, on CUDA"),
    "join_small": _Accepts("launch small elementwise kernels that wait for the same others as one, on CUDA"),
    "merge_convolutions": _Accepts("convolutions of one input as one, weights side by side, on CUDA"),
    "merge_products": _Accepts("matrix products of one input as one, weights side by side, on CUDA"),
    "unfold_patches": _Accepts("convolutions of patches that do not overlap as one matrix product, on CUDA"),
    "try_rewrites": _Accepts(
        "lower again with and without those of these seven that find something to do, and keep the fastest, on CUDA"
    ),
    "remember": _Accepts("keep profiles and winning schedules on disk, and search no more where one is found"),
    "annotate": _Accepts("name calls and kernels for profilers: record_function scopes, NVTX ranges on CUDA"),
}


@dataclass
class Compilation:
    """The compilation under way. reached: whether our hook or a module of ours from a cache served it.

    lowering_seconds: how long rewriting Inductor's wrapper took; nothing if it came from a cache. labels: a hash of the
    user's lines and modules that the graph came from, which caches do not go by unless kernels must have their names.
    bound: the `execution.runtime.Runtime`s made so far.
    """

    options: Options
    reached: bool = False
    lowering_seconds: float = 0.0
    labels: str = ""
    bound: list[Any] = field(default_factory=list)


_current: contextvars.ContextVar[Compilation | None] = contextvars.ContextVar("opara_compilation", default=None)


def current() -> Compilation:
    """The compilation under way in this context, or one with default options."""
    return _current.get() or Compilation(Options())


@contextlib.contextmanager
def using(options: Options, labels: str = "") -> Iterator[Compilation]:
    """Make `options` the current ones while the block runs, for a graph of these labels."""
    compilation = Compilation(options, labels=labels)
    token = _current.set(compilation)
    try:
        yield compilation
    finally:
        _current.reset(token)


def parse(options: Mapping[str, Any] | None, mode: str | None) -> tuple[Options, dict[str, Any]]:
    """Split `options` into ours, checked, and Inductor's, checked against Inductor's own types.

    `mode` is one of Inductor's (`reduce-overhead`, `max-autotune`, ...): what it sets passes through, except that
    CUDA Graphs are ours.
    """
    from opara_backend import upstream

    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"options takes a dict, got {options!r} of type {type(options).__name__}")
    known = upstream.inductor_option_names()
    modes = upstream.list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f"unknown mode {mode!r}; accepted: {', '.join(modes)}{_nearest(mode, tuple(modes))}")
    own: dict[str, Any] = {}
    passed: dict[str, Any] = dict(modes[mode]) if mode is not None else {}
    for key, value in (options or {}).items():
        name = _name(key)
        if name in ACCEPTED:
            own[name] = _check(name, value)
        elif name in known:
            upstream.check_inductor_option(name, value)
            passed[name] = value
        else:
            raise ValueError(_unknown(str(key), (*ACCEPTED, *known)))
    return Options(**own, given=frozenset(own)), passed


def without_rewrites(options: Options) -> Options:
    """`options` with no rewrite of the graph."""
    none: dict[str, Any] = dict.fromkeys(REWRITES, False)
    return replace(options, try_rewrites=False, **none)


def without_effect(options: Mapping[str, Any] | None) -> list[str]:
    """Which of the options given (`parse` has checked them) decide nothing beside the others on a GPU, and why."""
    given = {_name(key): value for key, value in (options or {}).items()}
    policy = given.get("policy", Options.policy)
    if policy == "auto":
        why = "which tries several orders: name a policy with it"
        return [f"option 'launch_order' has no effect with policy 'auto', {why}"] if "launch_order" in given else []
    why = "which is not searched for: leave it out, or set policy to 'auto'"
    return [
        f"option {key!r} has no effect with policy {policy!r}, {why}"
        for key in ("candidates", "search_seconds", "extra_memory")
        if key in given
    ]


def _name(key: Any) -> str:
    return str(key).replace("-", "_")  # as torch.compile does


def _check(key: str, value: Any) -> Any:
    accepts = ACCEPTED[key]
    default = getattr(Options(), key)
    if type(default) is float and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(
            f"option {key!r} ({accepts.meaning}) takes a value of type {type(default).__name__}, "
            f"got {value!r} of type {type(value).__name__}"
        )
    choices = accepts.choices() if accepts.choices is not None else ()
    if choices and value not in choices:
        raise ValueError(
            f"option {key!r} ({accepts.meaning}) takes one of {', '.join(choices)}, got {value!r}"
            + _nearest(value, choices)
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
