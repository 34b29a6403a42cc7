"""Arguments in, outputs out: what a captured graph must copy, and what it may not.

Takes: the arguments of the call being captured, later those of each call. Gives: static tensors the graph reads,
grouped copies into them, and outputs that belong to the caller.
Must not change: arguments, beyond copying back what the program writes into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opara_backend.execution.program import Program
from opara_backend.kernel_graph import KernelGraph


def flat_view(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with every element once: overlapping layouts (expanded, windowed) become their span of memory."""
    return _span(tensor) if _overlaps(tensor) else tensor


def _overlaps(tensor: torch.Tensor) -> bool:
    """True unless the layout surely gives every element memory of its own."""
    reach = 0
    for stride, size in sorted((t, s) for s, t in zip(tensor.shape, tensor.stride(), strict=True) if s > 1):
        if stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False


def _span(tensor: torch.Tensor) -> torch.Tensor:
    """The memory from the first to the last element, as one dimension."""
    extent = 1 + sum((s - 1) * t for s, t in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.as_strided(tensor, (extent,), (1,), tensor.storage_offset())


class StaticArguments:
    """The arguments a graph was captured with: some at the caller's addresses, the rest in memory of our own."""

    def __init__(self, program: Program, graph: KernelGraph, args: Sequence[Any]) -> None:
        written = {name for kernel in graph.kernels for name in kernel.writes}
        self.values: list[Any] = list(args)
        self._addresses: list[tuple[int, int]] = []
        self._copied: list[int] = []
        self._written_back: list[int] = []
        static = set(program.static_inputs)
        for position, value in enumerate(args):
            if not isinstance(value, torch.Tensor):
                continue
            if position in static:
                self._addresses.append((position, value.data_ptr()))
                continue
            own = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
            flat_view(own).copy_(flat_view(value))
            self.values[position] = own
            self._copied.append(position)
            if program.inputs[position] in written:
                self._written_back.append(position)
        self._targets = [flat_view(self.values[p]) for p in self._copied]

    def is_copied(self, position: int) -> bool:
        """True if the graph reads argument `position` from memory of our own."""
        return position in self._copied

    def accept(self, args: Sequence[Any]) -> bool:
        """True if every static argument still lives where the graph was captured to look for it."""
        return all(args[position].data_ptr() == address for position, address in self._addresses)

    def load(self, args: Sequence[Any]) -> None:
        """Copy the other arguments to where the graph reads them, in as few launches as their layouts allow."""
        if self._targets:
            torch._foreach_copy_(self._targets, [flat_view(args[p]) for p in self._copied])

    def store(self, args: Sequence[Any]) -> None:
        """Copy back what the graph wrote into arguments that were copied."""
        for position in self._written_back:
            flat_view(args[position]).copy_(flat_view(self.values[position]))

    def written_static(self, program: Program, graph: KernelGraph) -> list[torch.Tensor]:
        """Static arguments the program writes: state that must survive being run again and again."""
        written = {name for kernel in graph.kernels for name in kernel.writes}
        return [self.values[p] for p, _ in self._addresses if program.inputs[p] in written]


@dataclass(frozen=True)
class _View:
    """An output as a view of something: `source` counts groups of outputs or arguments; `offset` in elements."""

    source: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def over(self, base: torch.Tensor) -> torch.Tensor:
        """This view of `base`, a tensor of the same type, or a stretch of bytes."""
        typed = base if base.dtype == self.dtype else base.view(self.dtype)
        return typed.as_strided(self.size, self.stride, typed.storage_offset() + self.offset)


class OutputSpec:
    """How to give the caller outputs of its own: aliases stay aliases, everything else is copied once.

    Outputs belong together if they live in the same buffer: the arena is one storage for all buffers, so storages do
    not tell.
    """

    def __init__(self, program: Program, graph: KernelGraph, outputs: Sequence[Any], static: StaticArguments) -> None:
        kinds = {b.name: b.kind for b in graph.buffers}
        position = {name: i for i, name in enumerate(program.inputs)}
        self._recipe: list[tuple[str, Any]] = []
        self._sources: list[torch.Tensor] = []
        groups: dict[tuple[str, int], list[torch.Tensor]] = {}
        for value, root in zip(outputs, graph.outputs, strict=True):
            if isinstance(value, torch.Tensor) and root is not None and kinds[root] == "intermediate":
                groups.setdefault((root, value.untyped_storage().data_ptr()), []).append(value)
        number = {key: index for index, key in enumerate(groups)}
        self._sources = [_cover(sharing) for sharing in groups.values()]
        for value, root in zip(outputs, graph.outputs, strict=True):
            if not isinstance(value, torch.Tensor) or root is None or kinds[root] not in ("intermediate", "input"):
                self._recipe.append(("value", value))
            elif kinds[root] == "intermediate":
                index = number[root, value.untyped_storage().data_ptr()]
                view = _view(index, value, self._sources[index])
                whole = value.size() == self._sources[index].size() and value.stride() == self._sources[index].stride()
                self._recipe.append(("whole" if whole and not view.offset else "part", view))
            elif static.is_copied(position[root]):
                self._recipe.append(("argument", _view(position[root], value, static.values[position[root]])))
            else:
                self._recipe.append(("value", value))

    def collect(self, args: Sequence[Any], copy: bool) -> tuple[Any, ...]:
        """The outputs of the replay just queued; with `copy`, in memory the next replay does not touch."""
        owned = self._sources
        if copy and owned:
            owned = [torch.empty_strided(s.size(), s.stride(), dtype=s.dtype, device=s.device) for s in owned]
            torch._foreach_copy_(owned, self._sources)
        found = []
        for kind, recipe in self._recipe:
            if kind == "value":
                found.append(recipe)
            elif kind == "whole":
                found.append(owned[recipe.source])
            else:
                found.append(recipe.over(owned[recipe.source] if kind == "part" else args[recipe.source]))
        return tuple(found)


def _view(source: int, value: torch.Tensor, base: torch.Tensor) -> _View:
    start = value.storage_offset() * value.itemsize - base.storage_offset() * base.itemsize
    return _View(source, tuple(value.size()), tuple(value.stride()), start // value.itemsize, value.dtype)


def _cover(sharing: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor over the memory of all of `sharing`, each element once: the only one itself, or a stretch of bytes."""
    first = sharing[0]
    if all(o is first for o in sharing):
        return flat_view(first)
    start = min(o.storage_offset() * o.itemsize for o in sharing)
    start -= start % max(o.itemsize for o in sharing)
    end = max(_end(o) for o in sharing)
    as_bytes = torch.empty(0, dtype=torch.uint8, device=first.device)
    return as_bytes.set_(first.untyped_storage(), start, (end - start,), (1,))


def _end(tensor: torch.Tensor) -> int:
    """Byte of the storage behind the last element."""
    if tensor.numel() == 0:
        return int(tensor.storage_offset()) * tensor.itemsize
    last = sum((s - 1) * t for s, t in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + last + 1) * tensor.itemsize
