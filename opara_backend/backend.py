"""The front door: `torch.compile(model, backend="opara")`.

Takes: what Dynamo gives any backend (an FX graph, example inputs, `mode=`, `options=`). Gives: a callable.
Must not change: what the model computes. Inference graphs are lowered to programs of kernels and scheduled; graphs
that train, or that a device or option keeps from us, are stock Inductor's, and the reason is logged.

Found through the entry point group `torch_dynamo_backends`; nothing is registered at import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from opara_backend import fallback
from opara_backend import options as own_options
from opara_backend._version import __version__
from opara_backend.fallback import FallbackReason
from opara_backend.options import Options

# Inductor options that change what kind of text a wrapper is; with them there is nothing for us to rewrite.
_FOREIGN_WRAPPERS = ("cpp_wrapper", "fx_wrapper", "profile_bandwidth")


def opara(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. `options`: ours (see `Options`) and Inductor's. ValueError for a wrong option."""
    chosen, inductor = own_options.parse(options, mode)
    from opara_backend import upstream

    captures = inductor.pop("triton.cudagraphs", None)  # capturing is ours; stock CUDA Graphs only where we train
    with own_options.using(chosen):
        return upstream.compile_fx(
            gm,
            example_inputs,
            inner_compile=_InnerCompile(chosen, bool(captures)),
            config_patches={**inductor, **_cache_marker()},
        )


def _cache_marker() -> dict[str, Any]:
    """An entry for Inductor's configuration that makes every cache key ours, the user's own pass kept inside."""
    from opara_backend import upstream
    from opara_backend.lowering.marker import CacheMarker

    present = upstream.inductor_config.post_grad_custom_post_pass
    return {"post_grad_custom_post_pass": CacheMarker(present)}


class _InnerCompile:
    """Inductor's hook for each AOT graph: inference goes our way, training the stock way."""

    def __init__(self, options: Options, cudagraphs: bool) -> None:
        self.options, self.cudagraphs = options, cudagraphs

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        from opara_backend import upstream

        reason = self._why_stock(gm, example_inputs, kwargs)
        if reason is not None:
            fallback.step_down(*reason, policy=self.options.fallback)
            return upstream.compile_fx_inner(gm, example_inputs, **kwargs)
        from opara_backend.lowering import inductor as lowering

        request = lowering.LoweringRequest(tuple(sorted(kwargs.get("static_input_idxs") or ())))
        with upstream.inductor_config.patch(lowering.PATCHES), lowering.lowering(request, ("cpu", "cuda")):
            return upstream.compile_fx_inner(gm, example_inputs, **kwargs)

    def _why_stock(
        self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[FallbackReason, str] | None:
        from opara_backend import upstream

        if kwargs.get("is_backward") or not kwargs.get("is_inference"):
            return FallbackReason.TRAINING, "the graph computes gradients"
        for option in _FOREIGN_WRAPPERS:
            if getattr(upstream.inductor_config, option, False):
                return FallbackReason.UNSUPPORTED_OPTION, option
        devices = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)}
        foreign = sorted(devices - {"cpu", "cuda", "meta"})
        if foreign:
            return FallbackReason.UNSUPPORTED_DEVICE, ", ".join(foreign)
        return None


__all__ = ["__version__", "opara"]
