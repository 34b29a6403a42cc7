"""Backends of the benchmark by name, and how each makes a callable of a model.

Takes: a name. Gives: a `Variant`; a callable for a model and its inputs. Must not change: the model.
Errors: ValueError naming what was given and what is accepted.

| name | what runs |
| --- | --- |
| eager | PyTorch's operators one by one |
| cudagraph | the same, captured once by `torch.cuda.graph`; inputs copied in, outputs lent until the next call |
| dynamo | nothing: a backend that gives its first answer again, so its wall time is what Dynamo takes of every call |
| inductor, reduce-overhead, max-autotune | stock `torch.compile`, by mode |
| opara | this backend, the fastest of several schedules |
| opara:POLICY | this backend, one stream allocation policy |
| opara:paper | Algorithms 1 and 2, on as many streams as Algorithm 1 opens (128 at most) |
| opara:plain | this backend without rewrites of the graph, on stock Inductor's kernels |
| opara:POLICY-unfused, opara:unfused | the same on ATen's kernels: Inductor's mode "lite" generates none |

After a colon stand parts with commas between: a policy, `plain`, or KEY=VALUE for any option
(`opara:paper,candidates=28`, `reduce-overhead:freezing=True`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from opara_backend.options import ACCEPTED, REWRITES, parse
from opara_backend.scheduling.policies import policy_names

STOCK_MODES = {"inductor": None, "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}
PAPER = {"policy": "opara", "launch_order": "opara", "streams": int(ACCEPTED["streams"].high)}
UNFUSED, PLAIN = "unfused", "plain"
NO_REWRITES: dict[str, Any] = dict.fromkeys(REWRITES, False)
TRIED = "try_rewrites"  # and each of the rewrites that it tries
UNCOMPILED = ("eager", "cudagraph", "dynamo")
READ_WHILE_TRACING = ("freezing",)  # Dynamo asks Inductor's configuration for them, not `options`


@dataclass(frozen=True)
class Variant:
    """One backend. options: ours and Inductor's. unfused: on ATen's kernels."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    unfused: bool = False

    @property
    def needs_gpu(self) -> bool:
        """True if it cannot run on a CPU at all."""
        return self.kind == "cudagraph"

    @property
    def compiles(self) -> bool:
        """False if it runs eager's kernels, or none."""
        return self.kind not in UNCOMPILED

    @property
    def kernels(self) -> str:
        """Variants of the same word run the same kernels: compiled for one, they are for all."""
        rewrites = [f"-{key}={value}" for key, value in self.options.items() if key in (*REWRITES, TRIED)]
        return "".join([self.kind, self.settings, *rewrites])

    @property
    def settings(self) -> str:
        """What Inductor is told of kernels; variants of the same word have most of them in common."""
        given = [f"-{key}={value}" for key, value in self.options.items() if key not in ACCEPTED]  # Inductor's
        return "".join([f"-{UNFUSED}" if self.unfused else "", *given])

    def compile(self, model: nn.Module, *, remember: bool = False) -> Callable[..., Any]:
        """`model` under this backend, compiled at its first call.

        remember: whether this backend may find its schedule on disk, as users' processes do. Without it every process
        searches, so that what a search finds is measured as often as there are processes.
        """
        if self.kind == "eager":
            return model
        if self.kind == "cudagraph":
            return EagerGraph(model)
        if self.kind == "dynamo":
            return torch.compile(model, backend=Answered)
        given = {key: value for key, value in self.options.items() if key not in READ_WHILE_TRACING}
        traced = {key: value for key, value in self.options.items() if key in READ_WHILE_TRACING}
        if self.kind in STOCK_MODES:
            mode = STOCK_MODES[self.kind]
            if not given:
                compiled = torch.compile(model, mode=mode)
            else:  # it takes no mode beside them
                compiled = torch.compile(model, options={**mode_options(mode), **given})
        else:
            given = {**unfused_options(self.unfused), "remember": remember, **given}
            compiled = torch.compile(model, backend="opara", options=given)
        return FirstCallUnder(traced, compiled) if traced else compiled


def variant(name: str) -> Variant:
    """The backend called `name`; ValueError for one nobody knows, or an option that is wrong."""
    kind, _, rest = name.partition(":")
    if kind in (*UNCOMPILED, *STOCK_MODES) and not rest:
        return Variant(name, kind)
    if kind in STOCK_MODES and all("=" in part for part in rest.split(",")):
        stock = {key: _typed(value) for key, _, value in (part.partition("=") for part in rest.split(","))}
        if own := sorted(stock.keys() & ACCEPTED.keys()):
            raise ValueError(f"{name!r}: {', '.join(own)} is an option of opara's, and {kind} is stock Inductor")
        parse(stock, None)
        return Variant(name, kind, stock)
    if kind != "opara":
        raise ValueError(f"unknown backend {name!r}; accepted: {', '.join(accepted())}")
    options: dict[str, Any] = {}
    unfused = False
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if equals:
            options[key] = _typed(value)
            continue
        if key == PLAIN:
            options.update(NO_REWRITES)
            continue
        policy = key.removesuffix(UNFUSED).removesuffix("-")
        unfused = unfused or key.endswith(UNFUSED)
        if policy == "paper":
            options.update(PAPER)
        elif policy in policy_names():
            options["policy"] = policy
        elif policy:
            raise ValueError(f"unknown policy {policy!r} in {name!r}; accepted: {', '.join(accepted())}")
    parse(options, None)  # a wrong option is told now, not after minutes of other variants
    return Variant(name, kind, options, unfused)


def accepted() -> tuple[str, ...]:
    """Every name without options that `variant` takes, each policy on fused and unfused kernels."""
    policies = [f"opara:{policy}{suffix}" for suffix in ("", f"-{UNFUSED}") for policy in ("paper", *policy_names())]
    return (*UNCOMPILED, *STOCK_MODES, "opara", f"opara:{PLAIN}", *policies)


def unfused_options(unfused: bool = True) -> dict[str, Any]:
    """Options that keep every operator ATen's own: Inductor's mode "lite", seen in 2.11 and 2.13, and no rewrites.

    That mode keeps results that nobody reads, and would check the sizes of those that an operator has not made: of
    attention in float16, the sums that only training needs.
    """
    return {**mode_options("lite"), "size_asserts": False, **NO_REWRITES} if unfused else {}


def mode_options(mode: str | None) -> dict[str, Any]:
    """What one of Inductor's modes sets."""
    from opara_backend import upstream

    return dict(upstream.list_mode_options()[mode]) if mode is not None else {}


def defaults() -> tuple[str, ...]:
    """What is compared if nobody says: stock Inductor at its best for this machine, and this backend."""
    return ("reduce-overhead" if torch.cuda.is_available() else "inductor", "opara")


class FirstCallUnder:
    """`compiled`, whose first call, the one that compiles, finds `settings` in Inductor's configuration."""

    def __init__(self, settings: dict[str, Any], compiled: Callable[..., Any]) -> None:
        self._settings, self._compiled = settings, compiled
        self._called = False

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if self._called:
            return self._compiled(*inputs)
        self._called = True
        from opara_backend import upstream

        with upstream.inductor_config.patch(self._settings):
            return self._compiled(*inputs)


class Answered:
    """A backend for Dynamo: what the graph gave first, at every call. Right while the inputs stay what they are."""

    def __init__(self, graph: Callable[..., Any], _example_inputs: Sequence[Any]) -> None:
        self._graph: Callable[..., Any] | None = graph
        self._answer: Any = None

    def __call__(self, *inputs: Any) -> Any:
        if self._graph is not None:
            self._answer, self._graph = self._graph(*inputs), None
        return self._answer


class EagerGraph:
    """Eager kernels in one CUDA Graph: captured at the first call, replayed at the others."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._graph: Any = None
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._outputs: Any = None

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if self._graph is None:
            self._capture(inputs)
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._graph.replay()
        return self._outputs

    def _capture(self, inputs: Sequence[torch.Tensor]) -> None:
        self._inputs = tuple(x.clone() for x in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # cuDNN and cuBLAS choose and allocate here, not inside the capture
            for _ in range(3):
                self.model(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outputs = self.model(*self._inputs)
        self._graph = graph


def _typed(text: str) -> Any:
    """`text` as the number or truth value it spells, else itself."""
    words = {"True": True, "False": False}
    if text in words:
        return words[text]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
