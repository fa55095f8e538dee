"""Settings of PyTorch and the C library in this process: seeds, rounding, threads, memory, placement."""

import ctypes
import hashlib
import math
import os
from argparse import Namespace

import torch

from models import ExitNetwork
from models.module_state import set_memory_format
from utils import available_cores

# With fewer operations per thread, fewer threads are faster: every layer ends with a barrier. In bfloat16
# waiting threads spin, and one busy core slows all of them down: a thread must have more to do.
OPERATIONS_PER_THREAD, OPERATIONS_PER_BFLOAT16_THREAD = 5e8, 1e10
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
    # Old versions of glibc refuse more than 32 MiB. Setting the trim threshold alone would do harm: it ends
    # the adjustment of the other one, which begins at 128 KiB.
    if mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25):
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def limit_threads(
    threads: int | None = None,
    operations: float = math.inf,
    operations_per_thread: float = OPERATIONS_PER_THREAD,
) -> None:
    """Set the number of PyTorch's threads.

    Args:
        threads: Number of threads. If None, no more than a container's quota allows and ``operations``
            occupy, unless OMP_NUM_THREADS is set.
        operations: Operations of one forward pass of a batch.
        operations_per_thread: How many of them occupy a thread.
    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        useful = max(1, math.ceil(min(operations / operations_per_thread, 1024)))
        threads = min(torch.get_num_threads(), available_cores(), useful)
    if threads is not None:
        torch.set_num_threads(threads)


def limit_threads_of_steps(dtype: torch.dtype | None, operations: float) -> None:
    """Set the number of PyTorch's threads for training and evaluating on the CPU.

    Args:
        dtype: Type of mixed precision, None for float32 alone.
        operations: Forward operations of one step of this process.
    """
    if dtype is torch.bfloat16:
        limit_threads(operations=operations, operations_per_thread=OPERATIONS_PER_BFLOAT16_THREAD)
    else:
        limit_threads()


def set_tf32(enabled: bool) -> None:
    """Let GPUs round the inputs of float32 convolutions and matrix products to TensorFloat-32, or not."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def prepare_network_and_device(
    network: ExitNetwork, settings: Namespace, device: torch.device, operations: int
) -> None:
    """Move a network to its device, and make the device compute as the settings ask for.

    Args:
        network: The network.
        settings: Settings with tf32, channels_last, checkpoint_activations, evalmode and a resolved amp.
        device: Where it is to run.
        operations: Forward operations of one step of this process.
    """
    set_tf32(settings.tf32)
    if device.type == "cpu":
        is_bfloat16 = settings.amp == "bf16" and settings.evalmode != "runtime"
        limit_threads_of_steps(torch.bfloat16 if is_bfloat16 else None, operations)
    network.to(device)
    if settings.channels_last:
        set_memory_format(network, torch.channels_last)
    network.checkpoint_activations = settings.checkpoint_activations


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed PyTorch, the source of all randomness.

    Args:
        seed: Any number.
        deterministic: Allow only operations that repeat bit for bit.
    """
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed dropout and other random layers for one training step, so that a resumed run draws the same masks.

    Args:
        seed: Seed of the run.
        epoch: Completed epochs.
        step: Completed steps of this epoch.
        rank: Rank of this process; processes draw different masks.
    """
    digest = hashlib.sha256(f"{seed} {epoch} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Return True if the host or a device ran out of memory."""
    signs = (
        "can't allocate memory",
        "CUDA error: out of memory",
        "MPS backend out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in str(error) for sign in signs
    )
