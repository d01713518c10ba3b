"""Memory: what the C library does with what was freed, and whether there is any left."""

import torch

LARGEST_BLOCK = 31 * 2**20  # bytes; glibc learns nothing from blocks above 32 MiB


def keep_freed_memory() -> None:
    """Has glibc hold on to up to 62 MiB of freed memory, so that the next batch finds it ready.

    Layer after layer frees and allocates the same tens of MiB; getting them from the system anew, zeroed
    page by page, takes 2 to 15% of the time. glibc gives back what is free beyond twice the largest block
    that it ever mapped and freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). Freeing one that nobody touched
    costs nothing and tells it. With another C library nothing happens.
    """
    torch.empty(LARGEST_BLOCK, dtype=torch.uint8, device="cpu")


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is what torch raises where there is no memory left, on a GPU or a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
