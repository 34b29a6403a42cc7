"""What tests of rewritten graphs on a GPU have in common: a model beside itself in double precision."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from opara_backend.report.record import GraphRecord, collect


def replayed(model: nn.Module, x: Tensor, *, last: bool, options: dict[str, Any]) -> tuple[Tensor, Tensor, GraphRecord]:
    """The outputs of the third call, by replay, those of the model in float64, and what the backend made of it.

    last: model and input are laid out channels last.
    """
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", fullgraph=True, options=options)
        for _ in range(3):
            result = call(x)
    (record,) = records
    assert (record.replays, record.fallbacks) == (2, [])
    return result.double(), exact, record


def at_sizes(model: nn.Module, options: dict[str, Any], tolerance: float) -> GraphRecord:
    """What the backend made of a model of eight channels under dynamic sizes, whose outputs were eager's."""
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", dynamic=True, fullgraph=True, options=options)
        for images in (2, 3, 2, 3, 2, 3):
            x = torch.randn(images, 8, 20, 12, device="cuda")
            torch.testing.assert_close(call(x), model(x), rtol=tolerance, atol=tolerance)
    (record,) = records
    assert record.fallbacks == []
    return record
