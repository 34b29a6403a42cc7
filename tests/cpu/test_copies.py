"""Grouped copies: all of them are made, whatever types are mixed, and in as few launches as there are types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opara_backend.execution.arguments import copier

TYPES = (torch.float16, torch.float32, torch.int64, torch.bool, torch.complex64, torch.uint16)
ODD = (torch.uint16,)  # torch has no kernel that copies many of them


def tensors(dtypes: Sequence[torch.dtype]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Targets of zeros, and sources that differ from them and each other."""
    targets = [torch.zeros(3, dtype=dtype) for dtype in dtypes]
    return targets, [torch.arange(number + 1, number + 4).to(dtype) for number, dtype in enumerate(dtypes)]


@given(st.lists(st.sampled_from(TYPES), min_size=1, max_size=9))
def test_every_tensor_is_copied(dtypes: list[torch.dtype]) -> None:
    targets, sources = tensors(dtypes)
    copier(targets)(targets, sources)
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


@given(st.lists(st.sampled_from(TYPES), min_size=1, max_size=9))
def test_in_one_launch_a_type(dtypes: list[torch.dtype]) -> None:
    given_together: list[list[torch.dtype]] = []
    original = torch._foreach_copy_

    def counted(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> Any:
        given_together.append([target.dtype for target in targets])
        return original(targets, sources)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", counted)
        targets, sources = tensors(dtypes)
        copier(targets)(targets, sources)
    expected = {dtype: dtypes.count(dtype) for dtype in dtypes if dtype not in ODD}
    assert {group[0]: len(group) for group in given_together} == expected
    assert all(len(set(group)) == 1 for group in given_together)
    assert len(given_together) == len(expected)
