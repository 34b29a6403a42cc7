"""The front door: `torch.compile(model, backend="opara")`.

Takes: what Dynamo gives any backend (an FX graph, example inputs, `mode=`, `options=`). Gives: a callable.
Must not change: what the model computes. Inference graphs are lowered to programs of kernels and scheduled; graphs
that train, or that a device or option keeps from us, are stock Inductor's, and the reason is logged.

Found through the entry point group `torch_dynamo_backends`; nothing is registered at import.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from opara_backend import fallback
from opara_backend import options as own_options
from opara_backend.fallback import FallbackReason
from opara_backend.report.record import collect

log = logging.getLogger(__name__)

# Inductor options with which there is nothing for us to rewrite: another kind of wrapper, or one that looks at values.
_FOREIGN_OPTIONS = ("cpp_wrapper", "fx_wrapper", "profile_bandwidth", "nan_asserts")


def opara(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. `options`: ours (see `Options`) and Inductor's. ValueError for a wrong option."""
    return compiled(gm, example_inputs, mode, options)


def compiled(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    named: bool = False,
) -> Callable[..., Any]:
    """As `opara`. named: from caches only what came from the same lines and modules, so that kernels have names."""
    chosen, inductor = own_options.parse(options, mode)
    from opara_backend import upstream

    if inductor.get("freezing") and not upstream.inductor_config.freezing:
        # Dynamo has traced already, with parameters as arguments; frozen now, they would only be copied at every call.
        log.warning("option 'freezing' has no effect here: set torch._inductor.config.freezing before the first call")
        del inductor["freezing"]
    foreign = _why_foreign(example_inputs, inductor)
    if foreign is not None:
        fallback.step_down(*foreign, policy=chosen.fallback)
        return upstream.compile_fx(gm, example_inputs, config_patches=inductor)
    if _on_cuda(example_inputs):
        for note in own_options.without_effect(options):
            log.warning(note)
    try:
        return _compiled(gm, example_inputs, chosen, inductor, named)
    except (upstream.RestartAnalysis, fallback.OparaFallbackError):
        raise  # Dynamo traces once more; or a step down that was asked to be an error
    except Exception as error:
        rewrites = _rewrites(chosen, example_inputs)
        if not rewrites:
            raise
        made = _compiled(gm, example_inputs, own_options.without_rewrites(chosen), inductor, named)
        detail = f"with {', '.join(rewrites)}: {type(error).__name__}: {error}"
        fallback.step_down(FallbackReason.REWRITE_FAILED, detail, policy=chosen.fallback, error=error)
        return made


def _compiled(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    chosen: own_options.Options,
    inductor: Mapping[str, Any],
    named: bool,
) -> Callable[..., Any]:
    from opara_backend import upstream

    labels = _labels(gm)
    # Capturing is ours: Inductor would wrap its own CUDA Graphs around the programs.
    asked = _rewrites(chosen, example_inputs)
    patches = {**inductor, "triton.cudagraphs": False, **_passes(inductor, asked, labels if named else "")}
    start = time.perf_counter()
    # That cache knows of one lowering a graph.
    caching = upstream.without_autograd_cache() if _tries(chosen, example_inputs) else contextlib.nullcontext()
    with own_options.using(chosen, labels) as compilation, collect() as records, caching:
        made = upstream.compile_fx(gm, example_inputs, inner_compile=_compile_graph, config_patches=patches)
        if not compilation.reached:  # stock Inductor's module, from AOTAutograd's cache: only training leaves one there
            fallback.step_down(FallbackReason.TRAINING, "the graph computes gradients", policy=chosen.fallback)
    for record in records:
        record.spent(compile=time.perf_counter() - start, lowering=compilation.lowering_seconds)
    return made


def _why_foreign(example_inputs: Sequence[Any], inductor: Mapping[str, Any]) -> tuple[FallbackReason, str] | None:
    """Why a device or an option leaves the graph to stock Inductor, if one does."""
    from opara_backend import upstream

    for option in _FOREIGN_OPTIONS:
        if inductor.get(option, getattr(upstream.inductor_config, option, False)):
            return FallbackReason.UNSUPPORTED_OPTION, option
    devices = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)}
    foreign = sorted(devices - {"cpu", "cuda", "meta"})
    return (FallbackReason.UNSUPPORTED_DEVICE, ", ".join(foreign)) if foreign else None


def _rewrites(chosen: own_options.Options, example_inputs: Sequence[Any]) -> tuple[str, ...]:
    """Those the graph is lowered with, first if others are tried: these are compared with the graph as it is."""
    from opara_backend.lowering.passes import asked

    return asked(chosen, by_name=not _on_cuda(example_inputs) or _tries(chosen, example_inputs))


def _tries(chosen: own_options.Options, example_inputs: Sequence[Any]) -> bool:
    """True if the graph is lowered in several ways that are timed against each other."""
    from opara_backend import upstream

    # Frozen, a graph holds weights, and copies of it would be taken for those of another model's.
    frozen = upstream.inductor_config.freezing
    return chosen.try_rewrites and chosen.cuda_graph and not frozen and _on_cuda(example_inputs)


def _passes(inductor: Mapping[str, Any], asked: tuple[str, ...], labels: str) -> dict[str, Any]:
    """An entry for Inductor's configuration with our passes, which make every cache key ours, after the user's own."""
    from opara_backend import upstream
    from opara_backend.lowering.passes import SETTING, OwnPass, with_own

    given = inductor.get(SETTING, getattr(upstream.inductor_config, SETTING))
    return {SETTING: with_own(given, OwnPass(asked, labels))}


def _labels(gm: torch.fx.GraphModule) -> str:
    """A hash of the lines and modules that the nodes of `gm` came from: a graph that is alike has others."""
    digest = hashlib.sha256()
    for node in gm.graph.nodes:
        modules = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
        digest.update(f"{node.meta.get('stack_trace')}{modules}".encode())
    return digest.hexdigest()


def _compile_graph(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Inductor's hook for each AOT graph: inference goes our way, training the stock way."""
    from opara_backend import upstream

    compilation = own_options.current()
    if kwargs.get("is_backward") or not kwargs.get("is_inference"):
        if not kwargs.get("is_backward"):
            compilation.reached = True
            policy = compilation.options.fallback
            fallback.step_down(FallbackReason.TRAINING, "the graph computes gradients", policy=policy)
        return upstream.compile_fx_inner(gm, example_inputs, **kwargs)
    from opara_backend.execution.cuda_graph import compiling
    from opara_backend.lowering import alternatives, passes
    from opara_backend.lowering import inductor as lowering
    from opara_backend.lowering.under_way import LoweringRequest

    compilation.reached = True  # even if Inductor finds nothing to run in it, and makes no module
    static = tuple(sorted(kwargs.get("static_input_idxs") or ()))

    def lower(gm: torch.fx.GraphModule, asked: tuple[str, ...], looking: bool) -> Any:
        # Whoever has Inductor join kernels by its own choice gets that.
        join_small = "join_small" in asked and not upstream.inductor_config.combo_kernels
        request = LoweringRequest(static, join_small, looking)
        with lowering.lowering(request, ("cpu", "cuda")), passes.asking(asked, looking=looking):
            return upstream.compile_fx_inner(gm, example_inputs, **kwargs)

    asked = _rewrites(compilation.options, example_inputs)
    with compiling():
        if _tries(compilation.options, example_inputs):
            return alternatives.lowered(gm, lower, asked)
        return lower(gm, asked, False)


def _on_cuda(example_inputs: Sequence[Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs)


__all__ = ["opara"]
