"""Options that decide nothing on a GPU are said to."""

from __future__ import annotations

import logging

import pytest
import torch


def test_options_without_effect_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(8, 8).cuda()
    with caplog.at_level(logging.WARNING, "opara_backend"), torch.no_grad():
        torch.compile(model, backend="opara", options={"launch_order": "program"})(torch.randn(2, 8, device="cuda"))
    assert "option 'launch_order' has no effect with policy 'auto'" in caplog.text
