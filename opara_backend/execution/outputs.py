"""Outputs out of a captured graph: copies that belong to the caller, or loans that end with the next call.

Takes: what the program returned during capture, and the arguments it was captured with. Gives: what to return after
each replay.
Must not change: what aliases what. An output that is an argument comes back as that argument, views of one buffer
share memory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opara_backend import upstream
from opara_backend.execution.arguments import copier, flat_view
from opara_backend.execution.program import Program
from opara_backend.kernel_graph import KernelGraph

OVERWRITTEN = (
    "this output of a compiled model has been overwritten by a later call: the model was compiled with "
    'options={"copy_outputs": False}, which lends outputs only until the next call. '
    "Use it before that, clone() it, or leave copy_outputs at True"
)


class Loans:
    """Outputs lent until the next call: whoever reads one later gets an error instead of another call's values."""

    def __init__(self) -> None:
        self._lent: list[tuple[object, upstream.WeakStorage]] = []

    def lend(self, sources: Sequence[torch.Tensor], lender: object = None) -> list[torch.Tensor]:
        """The same memory behind new storages, which `lender` can take back alone."""
        found = []
        for source in sources:
            memory = source.untyped_storage()
            storage = upstream.storage_over(memory.data_ptr(), source.device, memory.nbytes())
            self._lent.append((lender, upstream.WeakStorage(storage)))
            empty = torch.empty(0, dtype=source.dtype, device=source.device)
            found.append(empty.set_(storage, source.storage_offset(), source.size(), source.stride()))
        return found

    def end(self, lender: object = None) -> frozenset[int]:
        """Take back what is lent, by `lender` alone if one is named: the memory is about to be written, or to be freed.

        Returns torch's addresses of the storages taken back (`_cdata`).
        """
        ended = [storage for by, storage in self._lent if lender is None or by is lender]
        self._lent = [(by, storage) for by, storage in self._lent if not (lender is None or by is lender)]
        for storage in ended:
            upstream.forbid_access(storage, OVERWRITTEN)
        return frozenset(storage.cdata for storage in ended)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.end()


@dataclass(frozen=True)
class _View:
    """An output as a view of something: `source` counts groups of outputs or arguments; `offset` in bytes."""

    source: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    conj: bool = False
    neg: bool = False

    def over(self, base: torch.Tensor) -> torch.Tensor:
        """This view of `base`, a tensor of the same type, or of another over the same memory."""
        found = self._over(_plain(base))
        found = found.conj() if self.conj else found
        return torch._neg_view(found) if self.neg else found

    def _over(self, base: torch.Tensor) -> torch.Tensor:
        if base.dtype == self.dtype:
            offset = base.storage_offset() + self.offset // base.itemsize
            return base.as_strided(self.size, self.stride, offset)
        offset = (base.storage_offset() * base.itemsize + self.offset) // self.dtype.itemsize
        empty = torch.empty(0, dtype=self.dtype, device=base.device)
        return empty.set_(base.untyped_storage(), offset, self.size, self.stride)


class OutputSpec:
    """How to give the caller outputs of its own: aliases stay aliases, everything else is copied once.

    Outputs belong together if they live in the same buffer: the arena is one storage for all buffers, so storages do
    not tell.
    """

    def __init__(self, program: Program, graph: KernelGraph, outputs: Sequence[Any], args: Sequence[Any]) -> None:
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
        self._layouts = [(s.size(), s.stride(), s.dtype, s.device) for s in self._sources]
        self._copy = copier(self._sources)
        # A copy of one tensor is cheaper by clone(), which keeps the layout unless there are gaps in it.
        self._clone = len(self._sources) == 1 and _is_dense(self._sources[0])
        for value, root in zip(outputs, graph.outputs, strict=True):
            if not isinstance(value, torch.Tensor) or root is None or kinds[root] not in ("intermediate", "input"):
                self._recipe.append(("value", value))
            elif kinds[root] == "intermediate":
                index = number[root, value.untyped_storage().data_ptr()]
                view, source = _view(index, value, self._sources[index]), self._sources[index]
                whole = (value.dtype, value.size(), value.stride()) == (source.dtype, source.size(), source.stride())
                self._recipe.append(("whole" if whole and not (view.offset or view.conj or view.neg) else "part", view))
            else:
                self._recipe.append(("argument", _view(position[root], value, args[position[root]])))
        sources = [recipe.source if kind == "whole" else None for kind, recipe in self._recipe]
        self._as_copied = sources == list(range(len(self._sources)))

    def collect(self, args: Sequence[Any], loans: Loans | None = None) -> tuple[Any, ...]:
        """The outputs of the replay just queued: in memory no replay touches, or lent through `loans`."""
        owned = self._owned() if loans is None else loans.lend(self._sources, self)
        if self._as_copied:
            return tuple(owned)
        found = []
        for kind, recipe in self._recipe:
            if kind == "value":
                found.append(recipe)
            elif kind == "whole":
                found.append(owned[recipe.source])
            else:
                found.append(recipe.over(owned[recipe.source] if kind == "part" else args[recipe.source]))
        return tuple(found)

    def _owned(self) -> list[torch.Tensor]:
        """Copies of the sources, layout for layout."""
        if self._clone:
            return [self._sources[0].clone()]
        copies = [torch.empty_strided(size, stride, dtype=t, device=d) for size, stride, t, d in self._layouts]
        if copies:
            self._copy(copies, self._sources)
        return copies


def _is_dense(tensor: torch.Tensor) -> bool:
    """True if `tensor.clone()` has its layout, strides of dimensions of one element included."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _view(source: int, value: torch.Tensor, base: torch.Tensor) -> _View:
    start = int(value.storage_offset()) * value.itemsize - int(base.storage_offset()) * base.itemsize
    return _View(
        source, tuple(value.size()), tuple(value.stride()), start, value.dtype, value.is_conj(), value.is_neg()
    )


def _cover(sharing: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor over the memory of all of `sharing`, each element once: the only one itself, or a stretch of bytes."""
    first = sharing[0]
    if all(o is first for o in sharing):
        return flat_view(_plain(first))
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


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without the bits that say it is to be read conjugated or negated."""
    tensor = torch._neg_view(tensor) if tensor.is_neg() else tensor
    return tensor.conj() if tensor.is_conj() else tensor
