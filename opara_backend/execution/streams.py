"""CUDA streams that nobody else works on, for captures to be made on.

Takes: a device and a number. Gives: that many streams, always the same ones.
Must not change: anything else on the device.

`torch.cuda.Stream()` deals out 32 streams per device by turns, so another thread's stream may be the very one a capture
is being made on; its kernels would become part of the graph. Captures exclude each other, so all may use these.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import torch

log = logging.getLogger(__name__)

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: the default stream neither waits for it nor is waited for


def private_streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """The first `count` private streams of `device`, made when first asked for and kept."""
    return [_private_stream(device, index) for index in range(count)]


@functools.cache
def _private_stream(device: torch.device, index: int) -> torch.cuda.Stream:
    """Made by the driver's own API. Where that cannot be had, a stream of torch's."""
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).query()  # the device's context is now there, and current
        made = ctypes.c_void_p()
        try:
            status = ctypes.CDLL("libcuda.so.1").cuStreamCreate(ctypes.byref(made), _NON_BLOCKING)
        except (OSError, AttributeError) as error:
            status = error
        if status == 0 and made.value is not None:
            return torch.cuda.ExternalStream(made.value, device=device)
        log.warning("no private stream (%s): do not capture models while other threads use streams of theirs", status)
        return torch.cuda.Stream(device)
