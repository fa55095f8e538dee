"""Settings of PyTorch and the C library in this process: seeds, rounding, threads, memory."""

import ctypes
import hashlib
import os

import torch

from utils import available_cores

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep what a training step frees for the next one.

    By default it returns large blocks to the system, which has to clear them when it hands them out again.
    Does nothing where the library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 2**30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def limit_threads(threads: int | None = None) -> None:
    """Set the number of PyTorch's threads.

    Args:
        threads: None: no more than a container's quota allows, unless OMP_NUM_THREADS is set.
    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = min(torch.get_num_threads(), available_cores())
    if threads is not None:
        torch.set_num_threads(threads)


def set_tf32(enabled: bool) -> None:
    """Let GPUs round the inputs of float32 convolutions and matrix products to TensorFloat-32, or not."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed PyTorch, the source of all randomness.

    Args:
        seed: any number.
        deterministic: allow only operations that repeat bit for bit.
    """
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed dropout and other random layers for one training step, so that a resumed run draws the same masks.

    Args:
        seed: of the run.
        epoch: completed epochs.
        step: completed steps of this epoch.
        rank: of this process; processes draw different masks.
    """
    digest = hashlib.sha256(f"{seed} {epoch} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Return True if the host or a device ran out of memory."""
    signs = (
        "can't allocate memory",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in str(error) for sign in signs
    )
