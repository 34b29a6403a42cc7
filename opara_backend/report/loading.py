"""MODULE:FACTORY or FILE.py:FACTORY -> a model and its inputs.

Takes: what stands on a command line. Gives: the function named, and what it returns, moved to a device. Must not
change: `sys.path`, but by the folder the function is found in. WrongArgument says what was given and what is accepted;
what the user's own code raises comes through.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

RETURNS = "(model, tuple of inputs), (model, dict of keyword inputs) or (model, tuple, dict)"


class WrongArgument(Exception):
    """What was given and what is accepted."""


def factory_of(name: str) -> Callable[[], Any]:
    """The function that `name` names."""
    module_name, _, attribute = name.rpartition(":")
    if not (module_name and attribute):
        raise WrongArgument(
            f"{name!r} is not of the form MODULE:FACTORY, as in opara_backend.demo.googlenet:example, "
            "or FILE.py:FACTORY"
        )
    found: Any = _module(module_name, name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            functions = [n for n in vars(found) if callable(getattr(found, n)) and not n.startswith("_")]
            raise WrongArgument(f"{module_name} has no {attribute!r}; it has: {', '.join(sorted(functions)) or 'none'}")
        found = getattr(found, part)
    if not callable(found):
        raise WrongArgument(f"{name!r} is a {type(found).__name__}, not a function")
    factory: Callable[[], Any] = found
    return factory


def _module(module_name: str, name: str) -> ModuleType:
    if module_name.endswith(".py") or "/" in module_name or "\\" in module_name:
        return _module_of_file(Path(module_name))
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise WrongArgument(f"no module named {error.name!r}, needed for {name!r}; is it installed?") from error
    except TypeError as error:
        if module_name.startswith("."):
            raise WrongArgument(f"{name!r} is relative; accepted: the whole name of a module, or a file") from error
        raise


def _module_of_file(path: Path) -> ModuleType:
    """The module in a file, which may import others of its folder, as a script may."""
    if not path.is_file():
        raise WrongArgument(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise WrongArgument(f"{path} is no Python file; accepted: FILE.py:FACTORY")
    sys.path.insert(0, str(path.absolute().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # classes of the module look themselves up there
    spec.loader.exec_module(module)
    return module


def made_by(
    factory: Callable[[], Any], name: str, device: Any, dtype: str | None
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model, its inputs by position and by keyword, as `factory` returns them, on the device and of the type."""
    import torch

    from opara_backend.upstream import tree_map

    made = factory()
    if not (isinstance(made, tuple) and len(made) in (2, 3) and callable(made[0])):
        what = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise WrongArgument(f"{name!r} returned {what}; accepted: {RETURNS}")
    model, *given = made
    if len(given) == 1:
        (inputs,) = given
        if isinstance(inputs, list):
            raise WrongArgument(f"{name!r} returned a list of inputs; accepted: {RETURNS}")
        given = [(), inputs] if isinstance(inputs, Mapping) else [inputs, {}]
    inputs, keywords = given
    if not isinstance(keywords, Mapping) or not all(isinstance(key, str) for key in keywords):
        raise WrongArgument(f"{name!r} returned a {type(keywords).__name__} for keyword inputs; accepted: {RETURNS}")
    kind = getattr(torch, dtype) if dtype is not None else None

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, kind if value.is_floating_point() else None)

    if isinstance(model, torch.nn.Module):
        model = model.to(device, kind)
    by_position = inputs if isinstance(inputs, tuple) else (inputs,)
    return model, tuple(tree_map(moved, by_position)), {key: tree_map(moved, value) for key, value in keywords.items()}
