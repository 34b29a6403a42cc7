"""Each launch asks for its own stream, whatever this torch calls the one that Inductor asks for once."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

from opara_backend.lowering.sorting import Unsupported, _fresh_stream


def name_of_this_torch() -> str:
    """What Inductor calls the raw stream of device 3."""
    if importlib.util.find_spec("torch._inductor.stream_utils") is None:
        return "stream3"
    utilities = importlib.import_module("torch._inductor.stream_utils")
    found: str = getattr(utilities, "get_raw_stream_name", lambda index: f"stream{index}")(3)
    return found


@pytest.mark.parametrize("name", ["stream3", "raw_stream3", name_of_this_torch()])
def test_a_launch_asks_for_the_stream_itself(name: str) -> None:
    text = [f"{name} = get_raw_stream(3)", f"triton_poi_fused_0.run(upstream3, buf0, 16, stream={name})"]
    assert _fresh_stream(text) == ["triton_poi_fused_0.run(upstream3, buf0, 16, stream=get_raw_stream(3))"]


def test_under_a_name_nobody_knows_the_graph_is_left_to_inductor() -> None:
    with pytest.raises(Unsupported, match="launch on a stream called 'stream=s3'"):
        _fresh_stream(["s3 = get_raw_stream(3)", "triton_poi_fused_0.run(buf0, 16, stream=s3)"])
