"""Memory: what was freed is kept, what is not needed is given back, and whether any is left."""

import ctypes
import mmap
from collections.abc import Iterable
from io import RawIOBase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LARGEST_BLOCK = 31 * 2**20  # bytes; glibc learns nothing from blocks above 32 MiB
# A number for each page of this process; its three highest bits: in memory, swapped out, a file's (proc(5)).
PAGEMAP = Path("/proc/self/pagemap")
FILE_ONLY = (0b000, 0b001, 0b101)  # never touched; not in memory; in memory


def keep_freed_memory() -> None:
    """Has glibc hold on to up to 62 MiB of freed memory, so that the next batch finds it ready.

    Layer after layer frees and allocates the same tens of MiB; getting them from the system anew, zeroed
    page by page, takes 2 to 15% of the time. glibc gives back what is free beyond twice the largest block
    that it ever mapped and freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). Freeing one that nobody touched
    costs nothing and tells it. With another C library nothing happens.
    """
    torch.empty(LARGEST_BLOCK, dtype=torch.uint8, device="cpu")


def release_memory(tensors: Iterable[Tensor]) -> None:
    """Gives back the memory of tensors that are mapped from a file; what is used again is mapped again.

    For weights of which another copy was made. On Linux; elsewhere, and for what was written to, nothing. (A
    first write by another thread in this very moment would be lost.)
    """
    try:
        table = PAGEMAP.open("rb", buffering=0)
    except OSError:
        return
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None)
    with table:
        for tensor in tensors:
            first, end = -(-tensor.data_ptr() // page), (tensor.data_ptr() + tensor.nbytes) // page
            if tensor.is_cpu and first < end and _hold_only_a_file(table, first, end):
                size = ctypes.c_size_t((end - first) * page)
                libc.madvise(ctypes.c_void_p(first * page), size, mmap.MADV_DONTNEED)


def _hold_only_a_file(table: RawIOBase, first: int, end: int) -> bool:
    """Whether these pages hold nothing but what is in a file."""
    table.seek(8 * first)
    numbers = np.frombuffer(table.read(8 * (end - first)) or b"", np.uint64)
    return len(numbers) == end - first and bool(np.isin(numbers >> np.uint64(61), FILE_ONLY).all())


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is what torch, or a library under it, raises where there is no memory left."""
    signs = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
