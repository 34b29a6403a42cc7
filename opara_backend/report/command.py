"""`python -m opara_backend explain MODULE:FACTORY`.

Takes: parsed arguments. Gives: an exit code: 0, 1 if the model raised, 2 if an argument is wrong. Must not change:
anything but the files it is told to write.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")


class WrongArgument(Exception):
    """What was given and what is accepted."""


def register(commands: Any) -> None:
    """Add the subcommand to `commands`, an argparse subparsers object."""
    parser = commands.add_parser(
        "explain",
        help="compile a model and show what was done: kernels, streams, timelines",
        description="Compile a model with backend opara, call it, and show what was done.",
        epilog="example: python -m opara_backend explain opara_backend.demo.googlenet:example --html googlenet.html",
    )
    parser.add_argument(
        "factory",
        metavar="MODULE:FACTORY",
        help="a function in an importable module (the current folder is looked at first) that takes nothing and "
        "returns (model, tuple of inputs), both on the CPU",
    )
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with the timelines")
    parser.add_argument("--trace", metavar="FILE", type=Path, help="write a trace for https://ui.perfetto.dev")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report as JSON")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is a GPU, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model and its inputs; default: as they are")
    parser.add_argument("--policy", help="stream policy, as in options={'policy': ...}; default: auto")
    parser.add_argument("--all", action="store_true", help="list every kernel, not the first 25")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Explain what `chosen` names."""
    try:
        outputs = {"save_html": chosen.html, "save_trace": chosen.trace, "save_json": chosen.json}
        for path in outputs.values():
            if path is not None and not path.absolute().parent.is_dir():
                raise WrongArgument(f"{path}: there is no folder {path.absolute().parent}")
        _check_policy(chosen.policy)
        device = _device(chosen.device)
        factory = _factory(chosen.factory)
    except WrongArgument as error:
        print(f"explain: {error}", file=sys.stderr)
        return 2
    try:
        model, inputs = _made(factory, chosen.factory, device, chosen.dtype)
    except WrongArgument as error:
        print(f"explain: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        print(f"explain: {chosen.factory} raised the exception above", file=sys.stderr)
        return 1
    return _explain(model, inputs, {"policy": chosen.policy} if chosen.policy else None, outputs, chosen.all)


def _explain(
    model: Any, inputs: tuple[Any, ...], options: dict[str, str] | None, outputs: dict[str, Path | None], all_: bool
) -> int:
    from rich.console import Console

    from opara_backend.report.explain import explain
    from opara_backend.report.text import SHOWN, rendered

    progress, console = Console(stderr=True), Console()
    try:
        with progress.status("compiling, calling and measuring"):
            report = explain(model, *inputs, options=options)
    except Exception:
        traceback.print_exc()
        print("explain: the model, or its compilation, raised the exception above", file=sys.stderr)
        return 1
    console.print(rendered(report, None if all_ else SHOWN, console.width))
    for name, path in outputs.items():
        if path is not None:
            print(f"wrote {getattr(report, name)(path)}")
    return 0


def _check_policy(policy: str | None) -> None:
    from opara_backend.options import ACCEPTED

    choices = ACCEPTED["policy"].choices
    accepted = choices() if choices is not None else ()
    if policy is not None and policy not in accepted:
        raise WrongArgument(f"--policy {policy}: unknown; accepted: {', '.join(accepted)}")


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WrongArgument(f"--device {name}: accepted: cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise WrongArgument(f"--device {name}: accepted: cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise WrongArgument(f"--device {name}: this torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _factory(name: str) -> Callable[[], Any]:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise WrongArgument(f"{name!r} is not of the form MODULE:FACTORY, as in opara_backend.demo.googlenet:example")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise WrongArgument(f"no module named {error.name!r}, needed for {name!r}; is it installed?") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            functions = [n for n in vars(found) if callable(getattr(found, n)) and not n.startswith("_")]
            raise WrongArgument(f"{module_name} has no {attribute!r}; it has: {', '.join(sorted(functions)) or 'none'}")
        found = getattr(found, part)
    if not callable(found):
        raise WrongArgument(f"{name!r} is a {type(found).__name__}, not a function")
    factory: Callable[[], Any] = found
    return factory


def _made(factory: Callable[[], Any], name: str, device: Any, dtype: str | None) -> tuple[Any, tuple[Any, ...]]:
    """What the factory returns, moved to the device and element type."""
    import torch
    from torch.utils._pytree import tree_map

    made = factory()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise WrongArgument(f"{name!r} returned a {type(made).__name__}; accepted: (model, tuple of inputs)")
    model, inputs = made
    kind = getattr(torch, dtype) if dtype is not None else None

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, kind if value.is_floating_point() else None)

    if isinstance(model, torch.nn.Module):
        model = model.to(device, kind)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    return model, tuple(tree_map(moved, given))
