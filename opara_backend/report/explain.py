"""`opara_backend.explain`: compile, call, and say what was done.

Takes: a model or a function, compiled or not, and its arguments. Gives: a `Report`.
Must not change: the compiled object it is given, whose own compiled code is neither used nor replaced. A fresh
compilation of the same callable is made under a function of its own, so Dynamo's caches for the model stay as they
are (behind a graph break, code of the model itself gains entries). The model *is* called, several times: buffers and
inputs that it writes are put back (`untouched`), other side effects happen as often. Inductor's caches know graphs that
are alike, and not whose: nothing is taken from them but what an earlier explanation of the same lines left there.
"""

from __future__ import annotations

import builtins
import contextlib
import platform
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from opara_backend import fallback
from opara_backend import options as own_options
from opara_backend._version import __version__
from opara_backend.profiling.device import preset
from opara_backend.report.build import fallback_row, graph_reports
from opara_backend.report.model import Report
from opara_backend.report.record import GraphRecord, collect
from opara_backend.report.untouched import untouched

_CALLS = 3  # a dynamic shape is captured by its second call and replayed from the third on
ESTIMATED_DEVICE = "H200"


def explain(model: Callable[..., Any], *inputs: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """Compile `model` with backend opara, call it on `inputs` and `kwargs`, and report what was done.

    A model that is compiled already is compiled anew as it was (mode, options, dynamic), in the caller's grad mode: a
    report on a call that trains says so. Anything else is compiled with `options` under `torch.no_grad()`. The model
    is called three times; on a GPU five more times, under torch.profiler, for the measured timeline. What these calls
    write into buffers and inputs is put back, for which as much memory is taken meanwhile; the rest of what they do,
    to parameters, to Python objects, to generators of random numbers, stays done.
    On the CPU, demands and timelines are estimated for a GPU, and say so.
    """
    from opara_backend import upstream

    given = upstream.compiled_with(model)
    if given is not None and options is not None:
        raise ValueError("options= is for models that are not compiled yet; this one is explained with its own")
    original, settings, dynamic = given or (model, {"options": options} if options else {}, None)
    own_options.parse(settings.get("options"), settings.get("mode"))  # before anything is traced
    quiet = contextlib.nullcontext() if given is not None else torch.no_grad()
    places: dict[str, list[str]] = {}
    before_calls = untouched(_owner(original), (inputs, kwargs))
    with quiet, before_calls, _recompilable(), _compiled(original, settings, dynamic, places) as call:
        before = Counter(upstream.counters["graph_break"])
        with collect() as records, fallback.collect() as steps:
            for _ in range(_CALLS):
                call(*inputs, **kwargs)
        breaks = Counter(upstream.counters["graph_break"]) - before  # how often says nothing: some are counted twice
        report = _report(original, settings, records, steps, {**dict.fromkeys(breaks, ()), **places})
        if any(captured for record in records for _, captured in record.plans.values()):
            from opara_backend.report.replays import with_measured

            report = with_measured(report, records, lambda: call(*inputs, **kwargs))
    return report


@contextlib.contextmanager
def _recompilable() -> Iterator[None]:
    """A stance of the caller's that forbids compiling would leave nothing to report."""
    with torch.compiler.set_stance("default"):
        yield


@contextlib.contextmanager
def _compiled(
    model: Callable[..., Any], settings: Mapping[str, Any], dynamic: bool | None, places: dict[str, list[str]]
) -> Iterator[Callable[..., Any]]:
    """`model` compiled by a backend and under code that nobody else has, so that no cache of Dynamo's serves it.

    It is forgotten behind the block, so that captured graphs give their memory back. places: gains, for each reason of
    Dynamo's to break a graph, the lines it did so at.
    """
    from opara_backend import backend, upstream

    def opara(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        if (broken := upstream.break_behind(gm)) is not None:
            reason, line = broken
            places.setdefault(reason, []).append(line)
        return backend.compiled(gm, example_inputs, settings.get("mode"), settings.get("options"), named=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # With globals of its own as well: Dynamo puts what it compiled there.
    scope = {"__name__": __name__, "__builtins__": builtins}
    own = types.FunctionType(call.__code__.replace(), scope, call.__name__, None, call.__closure__)
    try:
        yield torch.compile(own, backend=opara, dynamic=dynamic)
    finally:
        upstream.forget_compiled(own)


def _report(
    model: Any,
    settings: Mapping[str, Any],
    records: list[GraphRecord],
    steps: list[fallback.Fallback],
    breaks: Mapping[str, Iterable[str]],
) -> Report:
    of_graphs = {id(step) for record in records for step in record.fallbacks}
    found = next((r.graph.device for r in records if r.graph.device != "cpu"), "cpu")
    device = torch.cuda.get_device_name(torch.device(found)) if found.startswith("cuda") else platform.processor()
    options = {**{k: v for k, v in settings.items() if k != "options"}, **(settings.get("options") or {})}
    versions = {"opara": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    owner = _owner(model)
    notes = [] if records else ["no graph of this model was ours to schedule"]
    notes += _said(breaks)
    if owner is not None and owner.training:
        notes.append("the model is in training mode, in which layers like dropout behave otherwise: model.eval()?")
    return Report(
        model=type(owner).__name__ if owner is not None else getattr(model, "__name__", type(model).__name__),
        device=f"{found} ({device})" if device else found,
        versions=tuple(versions.items()),
        options=tuple((str(k), str(v)) for k, v in sorted(options.items())),
        graphs=tuple(report for record in records for report in graph_reports(record, preset(ESTIMATED_DEVICE))),
        fallbacks=tuple({fallback_row(s): None for s in steps if id(s) not in of_graphs}),
        notes=tuple(notes),
        modules=tuple((p, type(m).__name__) for p, m in owner.named_modules() if p) if owner is not None else (),
    )


def _owner(model: Any) -> torch.nn.Module | None:
    """The module that `model` is, or is a method of."""
    return next((m for m in (model, getattr(model, "__self__", None)) if isinstance(m, torch.nn.Module)), None)


def _said(breaks: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Breaks of Dynamo's, each of which ends one graph and begins another: where, what it calls them, a hint or why.

    breaks: reasons, and the lines of each as far as they are known.
    """
    found: dict[str, dict[str, None]] = {}
    for reason, lines in breaks.items():
        first, *more = (line.strip() for line in reason.strip().splitlines())
        words = ("Hint:", "Explanation:")
        told = [line.partition(":")[2].strip() for word in words for line in more if line.startswith(word)]
        text = first.rstrip(".") + (f" ({told[0].rstrip('.')})" if told else "")
        found.setdefault(text, {}).update(dict.fromkeys(filter(None, lines)))
    for text, places in found.items():
        yield f"Dynamo broke the graph{f' at {_listed(places)}' if places else ''}: {text}"


def _listed(places: Iterable[str], shown: int = 4) -> str:
    """Some of them, and how many more there are."""
    first, more = [*places][:shown], [*places][shown:]
    return ", ".join(first) + (f" and {len(more)} more" if more else "")
