"""Arguments in: what a captured graph must copy, and what it may not.

Takes: the arguments of the call being captured, later those of each call. Gives: static tensors the graph reads, and
grouped copies into them.
Must not change: arguments, beyond copying back what the program writes into them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from opara_backend import upstream
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


_GROUPED = frozenset(
    (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
)

Copy = Callable[[list[torch.Tensor], list[torch.Tensor]], Any]


def copier(tensors: Sequence[torch.Tensor]) -> Copy:
    """What copies lists of tensors like these, targets first, in a launch a type where there is one for many tensors.

    Of a list of several types torch copies each tensor by itself.
    """
    alike: dict[torch.dtype | None, list[int]] = {}
    for place, tensor in enumerate(tensors):
        alike.setdefault(tensor.dtype if tensor.dtype in _GROUPED else None, []).append(place)
    together: Copy = torch._foreach_copy_
    groups = [(_copy_each if dtype is None else together, places) for dtype, places in alike.items()]
    if len(groups) == 1:
        return groups[0][0]

    def copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        for one, places in groups:
            one([targets[place] for place in places], [sources[place] for place in places])

    return copy


def _copy_each(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


class Layouts:
    """How static arguments lie, which is written into the kernels: those of the first call, which Dynamo traced.

    Dynamo's guards tell other layouts apart, unless a `guard_filter_fn` of the user's leaves them out.
    """

    def __init__(self, program: Program, args: Sequence[Any]) -> None:
        beside = {*program.dynamic_inputs, *program.number_inputs}
        static = (p for p in program.static_inputs if p not in beside)
        self._positions = [p for p in static if isinstance(args[p], torch.Tensor)]
        self._names = program.inputs
        self._expected = [_layout(args[p]) for p in self._positions]

    def check(self, args: Sequence[Any]) -> None:
        """RuntimeError if a static argument lies otherwise. A third of a microsecond each: not for replays."""
        unlike = [(p, e) for p, e in zip(self._positions, self._expected, strict=True) if _layout(args[p]) != e]
        wrong = [(p, e) for p, e in unlike if _read(_layout(args[p])) != _read(e)]
        if not wrong:
            return
        position, expected = wrong[0]
        others = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
        raise RuntimeError(
            f"input {position} ({self._names[position]}), a parameter or buffer, is not what was compiled for{others}: "
            f"found {_described(_layout(args[position]))}; accepted is {_described(expected)}. "
            "Copy new values into parameters (load_state_dict without assign=True), or call torch._dynamo.reset() and "
            "compile again. A guard_filter_fn that leaves out guards on modules keeps Dynamo from doing that by itself."
        )


_Layout = tuple[torch.dtype, torch.device, tuple[int, ...], tuple[int, ...]]


def _layout(tensor: torch.Tensor) -> _Layout:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _read(layout: _Layout) -> _Layout:
    """What of it kernels read by: no element is reached by the stride of a dimension of one, or of an empty tensor."""
    dtype, device, size, stride = layout
    return dtype, device, size, tuple(t if s > 1 and 0 not in size else 0 for s, t in zip(size, stride, strict=True))


def _described(layout: _Layout) -> str:
    dtype, device, size, stride = layout
    return f"{dtype} of size {tuple(size)} and strides {stride} on {device}"


class StaticArguments:
    """The arguments a graph was captured with: some at the caller's addresses, the rest in memory of our own."""

    def __init__(self, program: Program, graph: KernelGraph, args: Sequence[Any]) -> None:
        written = {name for kernel in graph.kernels for name in kernel.writes}
        self.values: list[Any] = list(args)
        self._static: list[int] = []
        self._addresses = [0] * len(args)
        self._memory: list[upstream.WeakStorage] = []
        self._copied: list[int] = []
        self._written_back: list[int] = []
        static = set(program.static_inputs)
        for position, value in enumerate(args):
            if not isinstance(value, torch.Tensor) or position in program.number_inputs:
                continue  # a number is part of the launches
            if position in static:
                self._static.append(position)
                self._addresses[position] = value.data_ptr()
                self._memory.append(upstream.WeakStorage(value.untyped_storage()))
                continue
            own = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
            flat_view(own).copy_(flat_view(value))
            self.values[position] = own
            self._copied.append(position)
            if program.inputs[position] in written:
                self._written_back.append(position)
        self._targets = [flat_view(self.values[p]) for p in self._copied]
        # Calls that come here have arguments laid out like these: it is part of what tells shapes apart.
        self._spans = [(p, _overlaps(self.values[p])) for p in self._copied]
        self._copy = copier(self._targets)

    def accept(self, args: list[Any]) -> bool:
        """True if every static argument still lives where the graph was captured to look for it.

        There are hundreds, and no line of Python runs for each.
        """
        return upstream.same_addresses(args, self._addresses, self._static)

    def expired(self) -> bool:
        """True if a static argument's memory has been freed: whatever lies there now is another tensor."""
        return any(memory.expired() for memory in self._memory)

    def static_bytes(self) -> int:
        """Bytes of the static arguments' memory, each piece once."""
        storages = {v.untyped_storage()._cdata: v.untyped_storage() for v in (self.values[p] for p in self._static)}
        return sum(storage.nbytes() for storage in storages.values())

    def let_go(self) -> None:
        """Keep static arguments alive no longer: capture is over, and only their addresses count."""
        for position in self._static:
            self.values[position] = None

    def load(self, args: Sequence[Any]) -> None:
        """Copy the other arguments to where the graph reads them, in as few launches as their layouts allow."""
        if self._targets:
            given = [_span(args[p]) if spanned else args[p] for p, spanned in self._spans]
            self._copy(self._targets, given)

    def store(self, args: Sequence[Any], ended: Collection[int] = ()) -> None:
        """Copy back what the graph wrote into arguments that were copied.

        ended: addresses of memory that was lent (`outputs.Loans`) until now. Nobody may read it any more, and the graph
        has written to it.
        """
        for position in self._written_back:
            if not ended or args[position].untyped_storage()._cdata not in ended:
                flat_view(args[position]).copy_(flat_view(self.values[position]))

    def written_static(self, program: Program, graph: KernelGraph) -> list[torch.Tensor]:
        """Static arguments the program writes: state that must survive being run again and again."""
        return self._written(program, graph, self._static)

    def written(self, program: Program, graph: KernelGraph) -> list[torch.Tensor]:
        """All arguments the program writes, as it finds them: static ones, and copies."""
        return self._written(program, graph, [*self._static, *self._copied])

    def _written(self, program: Program, graph: KernelGraph, positions: Sequence[int]) -> list[torch.Tensor]:
        written = {name for kernel in graph.kernels for name in kernel.writes}
        return [self.values[p] for p in positions if program.inputs[p] in written]

    @contextlib.contextmanager
    def copies_kept(self) -> Iterator[None]:
        """Put back what runs in the block write into copies of arguments."""
        before = [target.clone() for target in self._targets]
        try:
            yield
        finally:
            if before:
                self._copy(self._targets, before)
