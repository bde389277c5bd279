"""Memory between pages that may not be touched: a read or write past a buffer kills the process. Linux only."""

import ctypes
import math
import mmap

import torch

PAGE = mmap.PAGESIZE
PROT_NONE = 0
libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Tensors that end at a forbidden page, or with `after` begin behind one."""

    def __init__(self, after: bool):
        self.after, self.maps = after, []

    def __call__(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        size = math.ceil(max(tensor.nbytes, 1) / PAGE) * PAGE
        area = mmap.mmap(-1, size + PAGE)
        whole = torch.frombuffer(area, dtype=torch.uint8)
        forbidden = whole.data_ptr() + (0 if self.after else size)
        assert libc.mprotect(ctypes.c_void_p(forbidden), PAGE, PROT_NONE) == 0
        start = PAGE if self.after else size - tensor.nbytes
        self.maps.append(area)
        part = whole[start : start + tensor.nbytes].view(tensor.dtype) if tensor.nbytes else whole[start:start]
        guarded = part.view(tensor.dtype).view(tensor.shape)
        return guarded.copy_(tensor)
