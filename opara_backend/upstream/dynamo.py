"""What is opened of Dynamo's and AOTAutograd's: what was compiled and how, where it broke, their logs and caches.

Takes: what `torch.compile` made, and graphs of Dynamo's. Gives: what they were made from. Must not change: anything,
but that `forget_compiled` drops what was compiled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from opara_backend.upstream.private import CompileContext, effects, functorch_config, trace_structured


def break_behind(gm: torch.fx.GraphModule) -> tuple[str, str] | None:
    """Why Dynamo ended the graph `gm` before its function ended, and at which line (`file:line`); None if it did not.

    Seen 2.11, 2.13, 2.15. Without it reports do not say where graphs were broken.
    """
    found = getattr(gm, "compile_subgraph_reason", None)
    if found is None or not found.graph_break:
        return None
    line = f"{found.user_stack[-1].filename}:{found.user_stack[-1].lineno}" if found.user_stack else ""
    return str(found.reason), line


@contextlib.contextmanager
def own_output_strides() -> Iterator[None]:
    """Let what is compiled while the block runs tell nobody the strides of its outputs.

    Seen 2.11, 2.13, 2.15. Without it AOTAutograd is told twice, and refuses.
    """
    with torch._guards.TracingContext.report_output_strides():
        yield


def without_autograd_cache() -> Any:
    """A context in which AOTAutograd keeps and finds nothing; Inductor's own cache of graphs stays as it is.

    Seen 2.11, 2.13, 2.15. Without it a new process finds the first lowering of a graph, and not the others.
    """
    return functorch_config.patch(enable_autograd_cache=False)


def current_compile_id() -> Any:
    """What torch calls the compilation under way (`0/0`), or None."""
    return CompileContext.current_compile_id()


def trace_artifact(name: str, document: Callable[[], Any], compile_id: Any = None) -> None:
    """Put `document`, plain data, into the structured log of the compilation; nothing is made if nobody listens."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "json"},
        payload_fn=lambda: json.dumps(document(), indent=1),
        expect_trace_id=False,
        compile_id=compile_id,
    )


def has_ordered_effect(operator: Any) -> bool:
    """True if `operator` is registered as doing something on the host whose order counts.

    Seen 2.11, 2.13, 2.15. Without it such operators, which share no tensor, could change places.
    """
    known = isinstance(operator, torch._ops.OpOverload | torch._ops.HigherOrderOperator)
    return known and effects._get_effect(operator) is not None


def compiled_with(compiled: Any) -> tuple[Any, dict[str, Any], bool | None] | None:
    """What `torch.compile` was given to make `compiled`: the callable, `mode` and `options`, `dynamic`.

    None if it is not compiled. Seen 2.11, 2.13, 2.15. Without it reports use default options.
    """
    compiled = getattr(compiled, "_compiled_call_impl", None) or compiled  # `module.compile()`
    if isinstance(compiled, torch.nn.Module):
        original = getattr(compiled, "_orig_mod", None)
        contexts = [getattr(compiled, "dynamo_ctx", None)]
    else:
        original = getattr(compiled, "_torchdynamo_orig_callable", None)
        contexts = [cell.cell_contents for cell in getattr(compiled, "__closure__", None) or ()]
    if original is None:
        return None
    for context in contexts:
        backend: Any = getattr(context, "callback", None)
        while hasattr(backend, "_torchdynamo_orig_backend"):
            backend = backend._torchdynamo_orig_backend
        if hasattr(backend, "compiler_fn"):
            return original, dict(backend.kwargs), backend.dynamic
    return original, {}, None


def forget_compiled(function: Any) -> None:
    """Drop what Dynamo compiled for the code of `function`.

    Seen 2.11, 2.13, 2.15. Without it what `explain` compiled, captured graphs included, lives as long as the process.
    """
    torch._dynamo.eval_frame.reset_code(function.__code__)
