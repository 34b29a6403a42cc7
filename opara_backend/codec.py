"""Frozen dataclasses of tuples <-> JSON, by their annotations.

Takes: a dataclass, or text. Gives: text, or the dataclass. Must not change: anything. Errors: FormatError saying
where the text does not fit. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any


class FormatError(ValueError):
    """Text that is not what it should be; the message says where."""


def dump(value: Any, schema: int) -> str:
    """`value`, a dataclass, as one line of JSON that names its schema."""
    return json.dumps({"schema": schema, **dataclasses.asdict(value)}, separators=(",", ":"))


def load(text: str, kind: type, schema: int, what: str) -> Any:
    """The `kind` that `dump` wrote; `what` names it in errors."""
    try:
        data = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, or nested too deep
        raise FormatError(f"not a {what}: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != schema:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise FormatError(f"{what} of schema {found!r}; this version reads {schema}")
    del data["schema"]
    return decoded(data, kind, what)


def decoded(data: Any, kind: Any, where: str) -> Any:
    """The `kind` that `data`, read from JSON, stands for; `where` names it in errors."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in arguments:
            return None
        (kind,) = [a for a in arguments if a is not type(None)]
        return decoded(data, kind, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise FormatError(f"{where}: a list expected, found {type(data).__name__}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(decoded(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(data))
        if len(data) != len(arguments):
            raise FormatError(f"{where}: {len(arguments)} values expected, found {len(data)}")
        return tuple(decoded(item, k, f"{where}[{i}]") for i, (item, k) in enumerate(zip(data, arguments, strict=True)))
    if dataclasses.is_dataclass(kind):
        return _record(data, kind, where)
    if kind is float and type(data) is int:
        try:
            return float(data)
        except OverflowError as error:
            raise FormatError(f"{where}: {error}") from error
    if type(data) is not kind:
        raise FormatError(f"{where}: {kind.__name__} expected, found {type(data).__name__}")
    return data


def _record(data: Any, kind: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        found = ", ".join(sorted(data)) if isinstance(data, dict) else type(data).__name__
        raise FormatError(f"{where}: {', '.join(sorted(names))} expected, found {found}")
    values = {name: decoded(data[name], hints[name], f"{where}.{name}") for name in names}
    try:
        return kind(**values)
    except ValueError as error:  # what the class itself does not accept
        raise FormatError(f"{where}: {error}") from error


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")
