"""Memory and libraries on a GPU, below what torch documents: addresses, storages, pools, workspaces."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

# Seen 2.11, 2.13, 2.15. Tells whether a storage is still held, by a view for instance, after its Python object is gone.
# Without it an output lent with copy_outputs=False could not be taken back.
from torch.multiprocessing.reductions import StorageWeakRef as WeakStorage

__all__ = [
    "WeakStorage",
    "abandon_pool",
    "clear_cublas_workspaces",
    "clears_cublas_workspaces_by_stream",
    "forbid_access",
    "same_addresses",
    "storage_over",
]


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


def same_addresses(tensors: list[Any], addresses: list[int], positions: list[int]) -> bool:
    """True if the tensor at each of `positions` lies at the address that stands there in `addresses`.

    Seen 2.11, 2.13, in builds with CUDA. Without it parameters, often hundreds, are looked at one by one.
    """
    native: Any = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    if native is not None:
        return bool(native(tensors, addresses, positions))
    return all(tensors[p].data_ptr() == addresses[p] for p in positions)


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
