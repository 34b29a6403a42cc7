"""What comes out of calls that go through copied arguments, an arena and copied outputs, as a captured graph's do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.arguments import normal
from tests.cpu.test_programs import PURE
from tests.replayed import Replayed, replayed

__all__ = ["replayed"]  # a fixture

CALLS = 3


def agrees(function: Callable[..., Any], make: Callable[[int], Any], **how: Any) -> None:
    with torch.no_grad():
        call = torch.compile(function, backend="opara", **how)
        for n in range(CALLS):
            found, expected = tree_leaves(call(*make(n))), tree_leaves(function(*make(n)))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            for ours, theirs in zip(found, expected, strict=True):
                if isinstance(theirs, Tensor):  # negated ones are computed by Inductor
                    assert ours.is_conj() == theirs.is_conj()


@pytest.mark.parametrize("name", PURE)
def test_pure_functions(replayed: list[Replayed], name: str) -> None:
    agrees(*PURE[name])


def squared(x: Tensor) -> Tensor:
    y = torch.view_as_complex(x) * 2
    return y * y


CONJUGATED: dict[str, Callable[[Tensor], Any]] = {
    "beside itself": lambda x: (z := squared(x), z.conj()),
    "alone": lambda x: squared(x).conj(),
    "beside another": lambda x: (squared(x).conj(), torch.view_as_complex(x).sin()),
    "in part, and its real part": lambda x: ((z := squared(x)).conj()[1:], z.real),
    "its imaginary part, negated": lambda x: ((z := squared(x)).conj().imag, z),
}


@pytest.mark.parametrize("name", CONJUGATED)
def test_what_is_read_conjugated_or_negated_stays_so(replayed: list[Replayed], name: str) -> None:
    """Such a view has the bytes of what it is a view of: a copy of those came out plain, from the second call on."""
    agrees(CONJUGATED[name], lambda n: (normal(n, 4, 2),))
    assert replayed[0].replays == CALLS - 1


def test_a_buffer_that_is_padded_where_it_lies(replayed: list[Replayed]) -> None:
    """Inductor makes room behind each row; looking at a buffer so before it is alive was an error."""
    w = normal(0, 1128, 64)

    def padded(x: Tensor) -> Tensor:
        return F.pad(torch.softmax(x, -1), (0, 7, 0, 0)) @ w

    agrees(padded, lambda n: (normal(n, 37, 1121),), options={"disable_padding_cpu": False})
    assert torch._dynamo.utils.counters["inductor"]["inplace_padding"]
    assert replayed[0].replays == CALLS - 1
