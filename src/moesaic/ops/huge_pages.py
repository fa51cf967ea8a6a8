"""Memory in huge pages, for weights that are read from one end to the other.

A processor does not prefetch across the border of a page, and looks every page up, so reading in
pages of 2 MiB comes nearer to the rate of the memory than in those of 4 KiB.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_PAGE_BYTES = 2 << 20


def in_huge_pages(x: Tensor) -> Tensor:
    """Copy a tensor, contiguous, into huge pages where the system has them to give.

    What is smaller than a page, or on a system other than Linux, is copied into plain memory.
    """
    if x.nbytes < _PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return x.clone(memory_format=torch.contiguous_format)
    memory = mmap.mmap(-1, x.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # It is advice; a kernel built without them refuses it and gives small pages.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    copy = torch.frombuffer(memory, dtype=x.dtype).view(x.shape)
    return copy.copy_(x)
