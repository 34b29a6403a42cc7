"""What is opened of torch's CUDA runtime: streams, workspaces of libraries, storages and pools of memory.

Takes: tensors, streams, addresses. Gives: what torch knows of them. Must not change: anything but what each function
says. It is imported in builds without CUDA, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from opara_backend.upstream.private import FakeTensorMode, WeakStorage


def clear_cublas_workspaces(streams: Sequence[torch.cuda.Stream] | None = None) -> None:
    """Forget the workspaces cuBLAS keeps for `streams`, so that the next call allocates its own (pytorch#193402).

    Without `streams`, and where torch cannot tell streams apart, those of all streams and threads are forgotten, also
    while they are in use.
    Seen 2.11, 2.13, 2.15. Without it a captured graph may read a workspace somebody else frees.
    """
    clear = _clear_cublas_workspaces_of_one_stream()
    if clear is None or streams is None:
        torch._C._cuda_clearCublasWorkspaces()
        return
    for stream in streams:
        clear(stream.cuda_stream)


def clears_cublas_workspaces_by_stream() -> bool:
    """True if `clear_cublas_workspaces` leaves other streams alone."""
    return _clear_cublas_workspaces_of_one_stream() is not None


@functools.cache
def _clear_cublas_workspaces_of_one_stream() -> Callable[[int], None] | None:
    """`at::cuda::clearCublasWorkspacesForStream`, which Python cannot reach otherwise; takes a `cudaStream_t`.

    Declared in 2.13's headers; 2.11 has none (pytorch#175276). Without it other threads' workspaces go with ours.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
        found: Any = library._ZN2at4cuda30clearCublasWorkspacesForStreamEP11CUstream_st
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_void_p], None
    return found


def is_cudnn_convolution(
    x: tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device],
    weight: tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device],
    **settings: Any,
) -> bool:
    """True if cuDNN computes a convolution without bias of such operands (size, stride, dtype, device).

    Seen 2.11, 2.13, 2.15. Without it convolutions allocate their outputs themselves.
    """
    with FakeTensorMode():
        operands = [torch.empty_strided(s, t, dtype=d, device=on) for s, t, d, on in (x, weight)]
        found = torch._C._select_conv_backend(*operands, bias=None, bias_sizes=None, **settings)
    return bool(found == torch._C._ConvBackend.Cudnn)  # type: ignore[attr-defined]


# Seen 2.11, 2.13, in builds with CUDA. The index of the current device, and whether the current stream is being
# captured. Without them every call goes through functions of Python that first ask whether CUDA is initialised.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
is_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)

# Seen 2.11, 2.13, 2.14, in builds with CUDA. What tells the current stream of a CUDA device, named by its index, from
# its others; None where torch does not say. Without it every call makes an object of the stream, to compare it.
current_stream_key: Callable[[int], Any] = getattr(torch._C, "_cuda_getCurrentStream", lambda index: None)


def _same_addresses(tensors: list[Any], addresses: list[int], positions: list[int]) -> bool:
    found = map(torch.Tensor.data_ptr, map(tensors.__getitem__, positions))
    return all(map(operator.eq, found, map(addresses.__getitem__, positions)))


# Seen 2.11, 2.13, in builds with CUDA: whether the tensor at each of `positions` lies at the address that stands there
# in `addresses`. Without it C iterators do as much, of 287 in 27 us, not 23, on a GPU's host.
same_addresses: Callable[[list[Any], list[int], list[int]], bool] = getattr(
    torch._C, "_tensors_data_ptrs_at_indices_equal", _same_addresses
)


def occupy(seconds: float) -> None:
    """Keep the current CUDA stream busy for about so long, on one multiprocessor. At 2 GHz: no GPU is much faster.

    Seen 2.11, 2.13. Without it the replays of small graphs are timed no faster than the host launches them.
    """
    if (sleep := getattr(torch.cuda, "_sleep", None)) is not None:
        sleep(round(2e9 * seconds))


def holders(storage: torch.UntypedStorage) -> int:
    """How many hold the memory of `storage`: tensors, views, the object itself.

    Seen 2.11, 2.13. Without it an operator that keeps what it is given may find it overwritten, or gone.
    """
    count: Callable[[int], int] = getattr(torch._C, "_storage_Use_Count", lambda address: 1)
    return count(storage._cdata)


def references(tensor: torch.Tensor, storage: torch.UntypedStorage) -> tuple[int, ...]:
    """How often `tensor` and its `storage` are referred to, from Python and from C++, and how many hold the memory.

    Seen 2.11, 2.13. Without it: see `holders`.
    """
    used: Callable[[torch.Tensor], int] = getattr(torch.Tensor, "_use_count", lambda tensor: 1)
    return sys.getrefcount(tensor), sys.getrefcount(storage), used(tensor), holders(storage)


def storage_over(address: int, device: torch.device, nbytes: int) -> torch.UntypedStorage:
    """A storage over memory that somebody else owns and frees.

    Seen 2.11, 2.13, 2.15. Without it outputs that are not copied could not be told from the memory they lie in.
    """
    storage: Any = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return storage


def forbid_access(storage: WeakStorage, message: str) -> None:
    """From now on whoever asks for the data behind `storage` gets a RuntimeError that says `message`.

    Seen 2.11, 2.13, 2.15, in builds with CUDA. Without it an overwritten output reads wrong.
    """
    held = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
    if held is not None:
        torch._C._set_storage_data_ptr_access_error_msg(held._cdata, message)


def abandon_pool(device: torch.device, pool: tuple[int, int]) -> None:
    """End a failed capture's claim on memory pool `pool`, which `CUDAGraph.reset` gives back only after a success.

    Seen 2.11, 2.13, 2.15. Without it what a failed capture allocated is never freed (pytorch#190348).
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with contextlib.suppress(RuntimeError):  # it failed further on, when the first was done
            end(index, pool)
