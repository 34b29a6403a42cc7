"""The troubleshooting page: an entry for every reason, whose program steps down for that reason and no other."""

from __future__ import annotations

import pytest
import torch

from opara_backend.fallback import FallbackReason
from tests.documentation import ROOT, Block, blocks

PAGE = ROOT / "docs" / "troubleshooting.md"
PROGRAMS = {block.heading: block for block in blocks(PAGE) if block.language == "python"}
NEEDED = {
    FallbackReason.UNSUPPORTED_DEVICE: "needs another device",
    FallbackReason.UNSUPPORTED_LOWERING: "needs two GPUs",
    FallbackReason.OUT_OF_MEMORY: "needs a full GPU",
}


def run(block: Block) -> dict[str, int]:
    """What the block counts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    exec(block.compiled(), {"__name__": "__main__"})
    return dict(torch._dynamo.utils.counters["opara"])


def test_every_reason_has_an_entry_with_a_program() -> None:
    assert list(PROGRAMS) == [reason.value for reason in FallbackReason]


@pytest.mark.parametrize("reason", FallbackReason, ids=lambda reason: reason.value)
def test_the_program_shows_its_reason(reason: FallbackReason) -> None:
    block = PROGRAMS[reason.value]
    if block.mark == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
    elif block.mark:
        assert block.mark == NEEDED[reason]
        block.compiled()
        pytest.skip(block.mark)
    assert run(block) == {reason.value: 1}
