"""Convolutions of cuDNN that write into a buffer they are given, so that the memory planner may place it.

Takes: the IR node behind a call of `extern_kernels.convolution`, and the call's text. Gives: the text of a call with
`out=`, or None where another library computes it, or cannot be told which. Must not change: what is computed.

`aten.convolution` allocates its output itself, on the stream it runs on: memory that neither the planner nor another
stream can use again, and that nothing can be written in place over.
"""

from __future__ import annotations

import ast
from typing import Any

from opara_backend import upstream

CALL = "extern_kernels.convolution"
OUT_CALL = "convolution_out"
_GIVEN = ("stride", "padding", "dilation", "groups")


def with_out(node: Any, text: str) -> str | None:
    """`text`, which binds the output of `node`, as a call that fills it."""
    called = getattr(node, "python_kernel_name", None)
    if called != CALL or not isinstance(node.get_output_spec(), upstream.FixedLayout):
        return None
    statement, *others = ast.parse(text).body
    if others or not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Call):
        return None
    call = statement.value
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if not {*_GIVEN, "transposed", "output_padding", "bias"} <= given.keys():
        return None
    literal = {name: ast.literal_eval(given[name]) for name in (*_GIVEN, "transposed", "output_padding")}
    if len(call.args) != 2 or ast.unparse(given["bias"]) != "None" or literal["transposed"]:
        return None
    operands = [_described(operand) for operand in node.inputs[:2]]
    if None in operands or len(operands[0][0]) < 4:  # one dimension is computed as two, in other views
        return None
    if not upstream.is_cudnn_convolution(operands[0], operands[1], **literal):
        return None
    arguments = [*map(ast.unparse, call.args), *(f"{name}={literal[name]}" for name in _GIVEN)]
    return f"{OUT_CALL}({', '.join(arguments)}, out={node.get_name()})"


def _described(operand: Any) -> Any:
    """Size, stride, dtype and device of an operand; None where a size is symbolic, and may ask for another library."""
    size, stride = tuple(operand.get_size()), tuple(operand.get_stride())
    if any(getattr(n, "free_symbols", None) for n in (*size, *stride)):
        return None
    return tuple(map(int, size)), tuple(map(int, stride)), operand.get_dtype(), operand.get_device()
