"""What this backend adds to Inductor's passes over a graph, and the mark that enters every cache key with it.

Takes: the user's own passes, if any. Gives: passes for `post_grad_custom_pre_pass`, theirs first; the `uuid()` of
ours names this package, its version and its lowering's source, and so keeps our modules and stock Inductor's apart in
every cache. Must not change: what the user's passes do.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from opara_backend import upstream
from opara_backend._version import __version__
from opara_backend.lowering import depthwise, fused_convolutions, gemv, patches, siblings
from opara_backend.lowering.cells import open_cells
from opara_backend.lowering.columns import split_products
from opara_backend.lowering.under_way import finds_something, note_rewrite, static_inputs, under_way
from opara_backend.options import REWRITES, Options


def asked(options: Options, *, by_name: bool) -> tuple[str, ...]:
    """Which of `REWRITES` a graph is lowered with: those that are on. by_name: only those that somebody switched on."""
    only = options.given if by_name else REWRITES
    return tuple(name for name in REWRITES if getattr(options, name) and name in only)


def _vectors(graph: torch.fx.Graph) -> int:
    found = gemv.fuse_gemv(graph)
    if found:
        open_cells(graph)
        split_products(graph)
    return found


def _on_a_copy(rewrite: Callable[[torch.fx.Graph], int], graph: torch.fx.Graph) -> int:
    return rewrite(copy.deepcopy(graph))


_OF_GRAPHS: Mapping[str, Callable[[torch.fx.Graph], int]] = {
    "unfold_patches": patches.unfold_patches,
    "fuse_depthwise": depthwise.fuse_depthwise,
    "fuse_convolutions": lambda graph: fused_convolutions.fuse_convolutions(graph, static_inputs()),
    "merge_products": lambda graph: siblings.merge_products(graph, static_inputs()),
    "merge_convolutions": lambda graph: siblings.merge_convolutions(graph, static_inputs()),
    "fuse_gemv": _vectors,
}
"""Those of `REWRITES` that work on the graph before Inductor does, in their order: how much each found to do."""


class OwnPass(upstream.CustomGraphPass):
    """Rewrites a graph that we lower as asked to, after `inner`, a pass of the user's; training's is left to Inductor.

    asked: which of `REWRITES`; it enters the cache keys, for those made elsewhere too (`joining`). So do `labels`, and
    whether it is to be found out what the others would do (`looking`).
    """

    def __init__(self, asked: tuple[str, ...] = (), labels: str = "", looking: bool = False, inner: Any = None) -> None:
        self.asked, self.labels, self.looking, self.inner = asked, labels, looking, inner
        if "fuse_convolutions" in asked:
            fused_convolutions.operator()  # modules out of a cache call it, and then nothing else registers it

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self.inner is not None:
            self.inner(graph)
        if not under_way():
            return
        if self.looking:
            for name, rewrite in _OF_GRAPHS.items():
                if name not in self.asked and finds_something(name, functools.partial(_on_a_copy, rewrite, graph)):
                    note_rewrite(name, done=False)
        for name, rewrite in _OF_GRAPHS.items():
            if name in self.asked and rewrite(graph):
                note_rewrite(name)

    def uuid(self) -> Any:
        """None, which bypasses caches, if the inner pass cannot be told apart either."""
        mark = ("opara_backend", __version__, lowering_hash(), self.labels, self.asked, self.looking)
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


SETTING = "post_grad_custom_pre_pass"
"""Inductor's setting for passes: before its own, which take biases off products they can be added to later."""


@contextlib.contextmanager
def asking(asked: tuple[str, ...], *, looking: bool = False) -> Iterator[None]:
    """Let graphs lowered while the block runs be rewritten as `asked`; everything else as Inductor's settings say."""
    given = getattr(upstream.inductor_config, SETTING)
    (known,) = [one for one in (given if isinstance(given, list | tuple) else [given]) if isinstance(one, OwnPass)]
    with upstream.inductor_config.patch({SETTING: with_own(given, OwnPass(asked, known.labels, looking))}):
        yield


@functools.cache
def lowering_hash() -> str:
    """Hash of the sources that decide the emitted text: a changed lowering never meets a module of the old one."""
    package = pathlib.Path(__file__).parent.parent
    folders = [*sorted(package.glob("lowering/*.py")), *sorted(package.glob("upstream/*.py"))]
    digest = hashlib.sha256()
    for source in (*folders, package / "kernel_graph.py"):
        digest.update(source.read_bytes())
    return digest.hexdigest()
