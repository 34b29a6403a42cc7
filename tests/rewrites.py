"""Options for tests of single rewrites: those named are on, all others off."""

from __future__ import annotations

from typing import Any

from opara_backend.options import REWRITES


def only(*names: str, **more: Any) -> dict[str, Any]:
    """Options by which a graph is lowered with the rewrites `names`, and no others."""
    unknown = set(names) - set(REWRITES)
    assert not unknown, unknown
    return {**{name: name in names for name in REWRITES}, **more}
