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
    sizes = [s for s in tensor.shape if s != 1]
    if tensor.numel() == 0 or tensor.is_contiguous() or 0 not in tensor.stride() and len(sizes) == tensor.dim():
        if not _overlaps(tensor):
            return tensor
    span = 1 + sum((s - 1) * t for s, t in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.as_strided(tensor, (span,), (1,), tensor.storage_offset()) if _overlaps(tensor) else tensor


def _overlaps(tensor: torch.Tensor) -> bool:
    reach = 1
    for stride, size in sorted((t, s) for s, t in zip(tensor.shape, tensor.stride(), strict=True) if s > 1):
        if stride < reach:
            return True
        reach = stride * size if stride else reach
    return False


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
    """An output as a view of `source`, a group of outputs (index) or an argument (position)."""

    source: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class OutputSpec:
    """How to give the caller outputs of its own: aliases stay aliases, everything else is copied once."""

    def __init__(self, program: Program, graph: KernelGraph, outputs: Sequence[Any], static: StaticArguments) -> None:
        kinds = {b.name: b.kind for b in graph.buffers}
        position = {name: i for i, name in enumerate(program.inputs)}
        self._recipe: list[tuple[str, Any]] = []
        self._sources: list[torch.Tensor] = []
        groups: dict[int, int] = {}
        for value, root in zip(outputs, graph.outputs, strict=True):
            if not isinstance(value, torch.Tensor) or root is None or kinds[root] == "constant":
                self._recipe.append(("value", value))
            elif kinds[root] == "input" and position[root] in static._copied:
                base = static.values[position[root]]
                shift = value.storage_offset() - base.storage_offset()
                self._recipe.append(("argument", _View(position[root], tuple(value.size()), value.stride(), shift)))
            elif kinds[root] == "input":
                self._recipe.append(("value", value))
            else:
                storage = value.untyped_storage().data_ptr()
                span = self._span_of(outputs, storage)
                if storage not in groups:
                    groups[storage] = len(self._sources)
                    self._sources.append(span)
                shift = value.storage_offset() - span.storage_offset()
                view = _View(groups[storage], tuple(value.size()), value.stride(), shift)
                whole = value.size() == span.size() and value.stride() == span.stride() and shift == 0
                self._recipe.append(("whole" if whole else "part", view))

    @staticmethod
    def _span_of(outputs: Sequence[Any], storage: int) -> torch.Tensor:
        """The one output on this storage, or the stretch of memory that covers all outputs on it."""
        sharing = [o for o in outputs if isinstance(o, torch.Tensor) and o.untyped_storage().data_ptr() == storage]
        if all(o is sharing[0] for o in sharing) and not _overlaps(sharing[0]):
            return sharing[0]
        start = min(o.storage_offset() for o in sharing)
        end = max(
            o.storage_offset() + 1 + sum((s - 1) * t for s, t in zip(o.shape, o.stride(), strict=True)) for o in sharing
        )
        return torch.as_strided(sharing[0], (end - start,), (1,), start)

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
            elif kind == "part":
                base = owned[recipe.source]
                found.append(base.as_strided(recipe.size, recipe.stride, base.storage_offset() + recipe.offset))
            else:
                base = args[recipe.source]
                found.append(base.as_strided(recipe.size, recipe.stride, base.storage_offset() + recipe.offset))
        return tuple(found)
