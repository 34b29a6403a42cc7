"""Wrapper lines of Inductor, by what they mean for a program of kernels.

Takes: a line object. Gives: whether its class, or one it derives from, is of a kind. Classes are named, not
imported, because they differ between torch versions (seen: 2.11, 2.13, 2.15). Must not change: anything.
"""

from __future__ import annotations

from typing import Any

# Lines that only keep Inductor's own books: nothing of them reaches the program.
BOOKKEEPING = (
    "FreeLine",
    "FreeIfNotReusedLine",
    "NullLine",
    "CommentLine",
    "EnterDeviceContextManagerLine",
    "ExitDeviceContextManagerLine",
    "AssertAlignmentLine",
    "KernelDefinitionLine",
    "LineContext",
)
# Lines whose meaning our schedule would change: the user chose streams or pools, or the text is C++.
UNSUPPORTED = (
    "EnterDeviceContextManagerWithStreamInfoLine",
    "EnterCudaStreamContextLine",
    "EnterCudaMemPoolContextLine",
    "EnterKernelProfileScopeLine",
)
# Lines that make sure that an operator's result is laid out as its fake implementation said (2.11: plain text).
CHECKS = ("AssertSizeStrideLine", "GroupedAssertSizeStrideLine")
VIEWS = ("MultiOutputLine", "ReinterpretLine", "ReuseLine")
# Lines after which the host knows something it must wait for: sizes that depend on data, branches taken.
HOST = ("DynamicScalarLine", "UnbackedSymbolDefsLine", "EnterSubgraphLine", "ExitSubgraphLine")
# Lines that launch something.
CALLS = (
    "KernelCallLine",
    "ExternKernelAllocLine",
    "ExternKernelOutLine",
    "ExternKernelMultiOutLine",
    "IndexPutFallbackLine",
    "ScatterFallbackLine",
)


def is_a(line: Any, names: tuple[str, ...]) -> bool:
    """True if the class of `line` is called one of `names`, or derives from one that is."""
    return any(cls.__name__ in names for cls in type(line).__mro__)
