"""`python -m opara_backend explain MODULE:FACTORY`, or FILE.py:FACTORY.

Takes: parsed arguments. Gives: an exit code: 0, 1 if the model raised or a file could not be written, 2 if an argument
is wrong. Must not change: anything but the files it is told to write.
"""

from __future__ import annotations

import argparse
import ast
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opara_backend.report.loading import RETURNS, WrongArgument, factory_of, made_by

DTYPES = ("float32", "float16", "bfloat16")


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
        help="a function in a module (the current folder is looked at first) or a file, FILE.py:FACTORY, that takes "
        f"nothing and returns {RETURNS}, all on the CPU",
    )
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with the timelines")
    parser.add_argument("--trace", metavar="FILE", type=Path, help="write a trace for https://ui.perfetto.dev")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report as JSON")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is a GPU, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model and its inputs; default: as they are")
    parser.add_argument("--policy", help="stream policy, as in options={'policy': ...}; default: auto")
    parser.add_argument(
        "--option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="as in options={KEY: VALUE}: ours or Inductor's; may be given several times",
    )
    parser.add_argument("--all", action="store_true", help="list every kernel, not the first 25")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Explain what `chosen` names."""
    name, outputs = chosen.factory, {"save_html": chosen.html, "save_trace": chosen.trace, "save_json": chosen.json}
    doing = f"importing {name.rpartition(':')[0]}"
    try:
        for path in outputs.values():
            _check_output(path)
        options = _options(chosen.policy, chosen.option)
        device = _device(chosen.device)
        factory = factory_of(name)
        doing = name
        model, inputs, keywords = made_by(factory, name, device, chosen.dtype)
    except WrongArgument as error:
        print(f"explain: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        print(f"explain: {doing} raised the exception above", file=sys.stderr)
        return 1
    return _explain(model, inputs, keywords, options, outputs, chosen.all)


def _explain(
    model: Any,
    inputs: tuple[Any, ...],
    keywords: dict[str, Any],
    options: dict[str, Any],
    outputs: dict[str, Path | None],
    all_: bool,
) -> int:
    from rich.console import Console

    from opara_backend.report.explain import explain
    from opara_backend.report.text import SHOWN, rendered

    progress, console = Console(stderr=True), Console()
    try:
        with progress.status("compiling, calling and measuring"):
            report = explain(model, *inputs, options=options or None, **keywords)
    except Exception:
        traceback.print_exc()
        print("explain: the model, or its compilation, raised the exception above", file=sys.stderr)
        return 1
    console.print(rendered(report, None if all_ else SHOWN, console.width))
    code = 0
    for name, path in outputs.items():
        if path is not None:
            try:
                print(f"wrote {getattr(report, name)(path)}")
            except OSError as error:
                print(f"explain: {path} could not be written: {error.strerror}", file=sys.stderr)
                code = 1
    return code


def _check_output(path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise WrongArgument(f"{path}: there is no folder {path.absolute().parent}")
    if path is not None and path.is_dir():
        raise WrongArgument(f"{path} is a folder; accepted: the name of a file")


def _options(policy: str | None, given: Sequence[str]) -> dict[str, Any]:
    """What `--policy` and `--option` say, checked."""
    from opara_backend.options import parse

    found: dict[str, Any] = {} if policy is None else {"policy": policy}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise WrongArgument(f"--option {text}: accepted: KEY=VALUE")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    try:
        parse(found, None)
    except ValueError as error:
        raise WrongArgument(str(error)) from error
    return found


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
