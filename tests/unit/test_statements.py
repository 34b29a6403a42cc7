"""What kind of statement a line of a wrapper is, and which names it loads and stores."""

from __future__ import annotations

import pytest

from opara_backend.lowering.statements import parse


@pytest.mark.parametrize(
    ("text", "kind", "callee"),
    [
        # calls
        ("buf0 = alloc('buf0', (8, 16), (16, 1), torch.float32, 'cuda')", "call", "alloc"),
        ("triton_poi_0.run(a, b, 4, stream=get_raw_stream(0))", "call", "triton_poi_0.run"),
        ("triton_poi_0.run(a.item(), b, 4, stream=get_raw_stream(0))", "call", "triton_poi_0.run"),
        ("cpp_fused_add_0(a, b)", "call", "cpp_fused_add_0"),
        ("buf1 = extern_kernels.convolution(buf0, arg1_1, stride=(1, 1))", "call", "extern_kernels.convolution"),
        ("extern_kernels.mm(buf0, arg1_1, out=buf1)", "call", "extern_kernels.mm"),
        ("buf1 = torch.ops.aten.topk.default(buf0, 3)", "call", "torch.ops.aten.topk.default"),
        ("buf1 = aten.nonzero.default(buf0)\nbuf2 = buf1[0]", "call", "aten.nonzero.default"),
        # views
        ("buf3 = buf2[0]", "view", ""),
        ("buf3 = buf2", "view", ""),
        ("buf3 = buf2; del buf2  # reuse", "view", ""),
        ("buf3 = buf2.T", "view", ""),
        ("buf3 = reinterpret_tensor(buf2, (4, 2), (1, 4), 0)", "view", ""),
        ("buf3 = aten.view.dtype(buf2, torch.int32)", "view", ""),
        ("buf3 = torch.ops.aten.view.dtype(buf2, torch.int32)", "view", ""),
        ("buf3 = buf2.as_strided((4,), (1,))", "view", ""),
        ("buf3 = alloc_from_pool(pool, 0, torch.float32, (4,), (1,))", "view", ""),
        # arithmetic on sizes, and what does nothing
        ("s0 = 4*s1", "plain", ""),
        ("s0 = 1 + s1 // 2", "plain", ""),
        ("s0 = -s1", "plain", ""),
        ("s0 = max(1, s1)", "plain", ""),
        ("s0 = math.ceil(s1 / 4)", "plain", ""),
        ("s0 = 7", "plain", ""),
        ("del buf0", "plain", ""),
        ("del buf0, buf1", "plain", ""),
        ("# Topologically Sorted Source Nodes: [add]", "plain", ""),
        ("'a string'", "plain", ""),
        ("import math", "plain", ""),
        ("pass", "plain", ""),
        ("", "plain", ""),
        # what the host decides or must look at
        ("u0 = buf1.item()", "host", ""),
        ("u0 = 2 * buf1.item()", "host", ""),
        ("u0 = bool(buf1.item())", "host", ""),
        ("u0 = buf1.size(0)", "host", ""),
        ("u0 = buf1.stride(1).__floordiv__(2)", "host", ""),
        ("sizes = buf1.tolist()", "host", ""),
        ("buf2 = buf1.cpu()", "host", ""),
        ("torch.cuda.synchronize()", "host", ""),
        ("if x:", "host", ""),
        ("else:", "host", ""),
        ("elif u0 > 1:", "host", ""),
        ("while u0:", "host", ""),
        ("if x:\n    buf1 = f(buf0)", "host", ""),
        ("buf = [None] * 2", "host", ""),
        ("buf = [None, None]", "host", ""),
        ("buf[0] = buf1", "host", ""),
        ("u0 += 1", "host", ""),
        ("a, b = f(x)", "host", ""),
        ("assert u0 >= 0", "host", ""),
    ],
)
def test_kind(text: str, kind: str, callee: str) -> None:
    statement = parse(text)
    assert (statement.kind, statement.callee) == (kind, callee)


@pytest.mark.parametrize(
    ("text", "loads", "stores"),
    [
        ("k.run(a, b, 4, stream=get_raw_stream(0))", {"k", "a", "b", "get_raw_stream"}, set()),
        ("extern_kernels.mm(buf0, arg1_1, out=buf1)", {"extern_kernels", "buf0", "arg1_1", "buf1"}, set()),
        ("buf1 = aten.topk(buf0)\nbuf2 = buf1[0]", {"aten", "buf0", "buf1"}, {"buf1", "buf2"}),
        ("buf3 = buf2[0]", {"buf2"}, {"buf3"}),
        ("buf3 = reinterpret_tensor(buf2, (s0, 2), (1, s0), 0)", {"reinterpret_tensor", "buf2", "s0"}, {"buf3"}),
        ("buf3 = buf4 = buf2", {"buf2"}, {"buf3", "buf4"}),
        ("s0 = 4*s1", {"s1"}, {"s0"}),
        ("u0 = buf1.item()", {"buf1"}, {"u0"}),
        ("# buf0 = buf1", set(), set()),
    ],
)
def test_names(text: str, loads: set[str], stores: set[str]) -> None:
    statement = parse(text)
    assert set(statement.loads) == loads
    assert set(statement.stores) == stores
    assert len(statement.loads) == len(loads), "each name once"


def test_names_of_control_flow_are_found_though_it_does_not_parse_alone() -> None:
    assert {"u0", "buf_1"} <= set(parse("if u0 > buf_1.numel():").loads)


def test_loads_keep_the_order_of_mention() -> None:
    """What kernels read is reported in this order, so that a graph reads like the text it came from."""
    names = [name for name in parse("f(buf2, buf0, buf1, out=buf3)").loads if name.startswith("buf")]
    assert names == ["buf2", "buf0", "buf1", "buf3"]
