"""How PyTorch and the C library compute in this process: seeds, rounding, memory."""

import ctypes
import os

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep what a training step frees for the next one. By default it hands large blocks back to the system, which has to
    clear them when it gives them out again. Does nothing where the library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 2**30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def set_tf32(enabled: bool) -> None:
    """Whether float32 convolutions and matrix products on GPUs may round their inputs to TensorFloat-32."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed PyTorch, from which all that is random comes; with ``deterministic`` only operations that repeat bit for bit are allowed."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether memory ran short, of the host or of a device."""
    signs = (
        "can't allocate memory",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in str(error) for sign in signs
    )
