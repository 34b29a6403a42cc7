"""The captured graphs of one compiled graph: which of them serves a call, and how many there may be.

Takes: captured graphs as they are made. Gives: the one that was captured for a call's shape and reads its parameters
where they are now. Must not change: the graphs; those given up are reset, which frees their memory.

Several graphs may serve one shape: two instances of a class share compiled code, and each has its parameters elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

Key = tuple[Any, ...]

CAPTURES_PER_SLOT = 4  # captures made in all, per one that may be kept, before more have to be earned
REPLAYS_PER_CAPTURE = 100  # replays that earn one more: a capture costs about as much as so many calls


class Capture(Protocol):
    """What is kept here: one captured shape at one set of addresses."""

    def accepts(self, args: list[Any]) -> bool:
        """True if the graph reads its static arguments where `args` has them."""
        ...

    def expired(self) -> bool:
        """True if a static argument is gone, so that no call can have all of them any more."""
        ...

    def reset(self) -> None:
        """Give the memory back."""
        ...


class Captures:
    """At most `limit` captures. forgotten(key): called when the last capture of a shape has been given up."""

    def __init__(self, limit: int, forgotten: Callable[[Key], None]) -> None:
        self.limit, self._forgotten = limit, forgotten
        self._by_shape: dict[Key, list[tuple[Capture, list[int]]]] = {}
        self._clock = 0  # calls served
        self._made = 0

    def __len__(self) -> int:
        return sum(len(same) for same in self._by_shape.values())

    def __iter__(self) -> Iterator[Capture]:
        return (capture for same in self._by_shape.values() for capture, _ in same)

    def find(self, key: Key, args: list[Any]) -> Any:
        """The capture for this call, counted as used; None if there is none."""
        for capture, used in self._by_shape.get(key, ()):
            if capture.accepts(args):
                self._clock += 1
                used[0] = self._clock
                return capture
        return None

    def may_make_another(self) -> bool:
        """False once making captures does not pay: they are displaced, or their parameters move, before they serve."""
        return self._made < CAPTURES_PER_SLOT * self.limit + self._clock // REPLAYS_PER_CAPTURE

    def give_up_expired(self) -> None:
        """Give up what nobody can call any more."""
        for key in list(self._by_shape):
            for capture, _ in list(self._by_shape[key]):
                if capture.expired():
                    self._give_up(key, capture)

    def make_room(self) -> None:
        """Give up the least recently used beyond `limit - 1`."""
        while len(self) >= self.limit:
            _, key, capture = min(
                ((used[0], key, capture) for key, same in self._by_shape.items() for capture, used in same),
                key=lambda entry: entry[0],
            )
            self._give_up(key, capture)

    def add(self, key: Key, capture: Capture) -> None:
        """Keep `capture`, which counts as used now."""
        self._made += 1
        self._clock += 1
        self._by_shape.setdefault(key, []).append((capture, [self._clock]))

    def clear(self) -> None:
        """Give up all."""
        for key in list(self._by_shape):
            for capture, _ in list(self._by_shape[key]):
                self._give_up(key, capture)

    def _give_up(self, key: Key, capture: Capture) -> None:
        same = self._by_shape[key] = [entry for entry in self._by_shape[key] if entry[0] is not capture]
        capture.reset()
        if not same:
            del self._by_shape[key]
            self._forgotten(key)
