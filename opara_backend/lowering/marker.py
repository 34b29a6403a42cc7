"""The mark that keeps our generated modules and stock Inductor's apart in every cache.

Takes: the user's own post-grad pass, if any. Gives: a pass that runs it and whose `uuid()` names this package, its
version and its lowering's source. Must not change: the graph, beyond what the user's pass does.
"""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any

import torch

from opara_backend import upstream
from opara_backend._version import __version__


class CacheMarker(upstream.CustomGraphPass):
    """Runs `inner` and enters (package, version, labels, inner's uuid) into Inductor's and AOTAutograd's cache keys."""

    def __init__(self, inner: Any = None, labels: str = "") -> None:
        self.inner: Any = inner.inner if isinstance(inner, CacheMarker) else inner
        self.labels = labels

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self.inner is not None:
            self.inner(graph)

    def uuid(self) -> Any:
        """None, which bypasses caches, if the inner pass cannot be told apart either."""
        mark = ("opara_backend", __version__, lowering_hash(), self.labels)
        if self.inner is None:
            return mark
        inner = self.inner.uuid() if hasattr(self.inner, "uuid") else None
        return None if inner is None else (*mark, inner)


def lowering_hash() -> str:
    """Hash of the sources that decide the emitted text: a changed lowering never meets a module of the old one."""
    package = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for source in (*sorted(package.glob("*.py")), package.parent / "kernel_graph.py", package.parent / "upstream.py"):
        digest.update(source.read_bytes())
    return digest.hexdigest()
