"""Random schedules of real models on the GPU give what program order gives."""

from __future__ import annotations

import pytest
import torch

from tests.schedules import check


@pytest.mark.parametrize("name", ["googlenet", "bert_base", "moe_decode"])
def test_random_schedules_agree_bit_for_bit(name: str) -> None:
    found = check(name, torch.float16, 24)
    assert found.schedules >= 24
    assert found.most_streams > 8
    assert not found.differing
