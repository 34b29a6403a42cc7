"""What this backend adds to Inductor's passes over a graph, and the mark that enters every cache key with it.

Takes: the user's own passes, if any. Gives: passes for `post_grad_custom_pre_pass`, theirs first; the `uuid()` of
ours names this package, its version and its lowering's source, and so keeps our modules and stock Inductor's apart in
every cache. Must not change: what the user's passes do.
"""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any

import torch

from opara_backend import upstream
from opara_backend._version import __version__
from opara_backend.lowering import gemv as products
from opara_backend.lowering import joining
from opara_backend.lowering.cells import open_cells
from opara_backend.lowering.columns import split_products


class OwnPass(upstream.CustomGraphPass):
    """Fuses products of vectors, if asked to, after `inner`, a pass of the user's.

    gemv: whether to fuse them. join_small, labels: enter the cache keys too (`joining`, `backend.compiled`).
    """

    def __init__(
        self, *, gemv: bool = False, join_small: bool = False, labels: str = "", inner: Any = None
    ) -> None:  # fmt: skip
        self.gemv, self.join_small, self.labels, self.inner = gemv, join_small, labels, inner

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self.inner is not None:
            self.inner(graph)
        if self.gemv and products.fuse_gemv(graph):
            open_cells(graph)
            split_products(graph)

    def uuid(self) -> Any:
        """None, which bypasses caches, if the inner pass cannot be told apart either."""
        chosen = (products.DEVICES if self.gemv else (), joining.DEVICES if self.join_small else ())
        mark = ("opara_backend", __version__, lowering_hash(), self.labels, *chosen)
        if self.inner is None:
            return mark
        inner = self.inner.uuid() if hasattr(self.inner, "uuid") else None
        return None if inner is None else (*mark, inner)


def with_own(given: Any, own: OwnPass) -> Any:
    """The passes `given` in Inductor's configuration, and `own` after them."""
    users = [one for one in (given if isinstance(given, list | tuple) else [given]) if one is not None]
    # Within a compilation of ours, another's configuration has ours already, with the user's inside or beside it.
    users = [one.inner if isinstance(one, OwnPass) else one for one in users]
    users = [one for one in users if one is not None]
    if upstream.TAKES_SEVERAL_PASSES and users:
        return [*users, own]
    (own.inner,) = users or [None]
    return own


def lowering_hash() -> str:
    """Hash of the sources that decide the emitted text: a changed lowering never meets a module of the old one."""
    package = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for source in (*sorted(package.glob("*.py")), package.parent / "kernel_graph.py", package.parent / "upstream.py"):
        digest.update(source.read_bytes())
    return digest.hexdigest()
