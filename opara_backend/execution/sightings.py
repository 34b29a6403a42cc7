"""Which shapes come back: what is done for a shape once and for all waits for its second call.

Takes: the key of each call that nothing has been done for. Gives: whether its shape has been seen before.
Must not change: anything. What is remembered is bounded, so a shape may have to be seen anew.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

SIGHTINGS_KEPT = 1024  # shapes remembered while waiting for their second call


class Sightings:
    """True for the shape of a static graph, and for a dynamic shape from its second call on; counts each call.

    A shape seen once may never come back, and planning one costs as much as several calls, capturing one as hundreds.
    One thread at a time may ask.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[Any, ...], None] = OrderedDict()

    def __call__(self, key: tuple[Any, ...]) -> bool:
        again = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > SIGHTINGS_KEPT:
            self._seen.popitem(last=False)
        return key == () or again
