"""One process a core where a CPU trains: forked copies of this one, each with a single thread, that share every batch.

with shared_out(settings.batch_size, settings.gpu) as processes: ...   # runs once in every process

Two threads of one process would wait for each other in every convolution, and very long where another program uses a core.
"""

import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from engine.distributed import Processes, process_group
from settings import available_cores
from utils import UserError

MIN_SHARE = 32  # images of a step that a process must get: batch normalisation averages over them
MAX_SECONDS_TO_END = 20
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h

_is_copy = False


def leave_copy(status: int) -> None:
    """End this process if it is a forked copy: what follows belongs to the first process alone."""
    if _is_copy:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def is_copy() -> bool:
    """Whether this process was forked here; the first one speaks for all."""
    return _is_copy


def process_count(batch_size: int) -> int:
    """Processes to train with on the CPU: the environment's PROCESSES, else as many as there are cores and the batch can be shared by.

    Raises:
        UserError: PROCESSES is no number.
    """
    wanted = os.environ.get("PROCESSES")
    if wanted:
        if not wanted.isascii() or not wanted.isdigit() or int(wanted) < 1:
            raise UserError(f"PROCESSES={wanted} is no number of processes")
        return int(wanted)
    return max(n for n in range(1, available_cores() + 1) if n == 1 or (batch_size % n == 0 and batch_size // n >= MIN_SHARE))


@contextmanager
def shared_out(batch_size: int, gpu: tuple[int, ...] | None) -> Iterator[Processes]:
    """The processes of a training: torchrun's, or GPUs of this process, or forked copies of it, one a core.

    The block runs in every process; a copy ends with ``leave_copy``.

    Raises:
        UserError: as ``process_group`` and ``process_count``.
    """
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and not torch.cuda.is_available() and not gpu and sys.platform == "linux"
    count = process_count(batch_size) if is_alone else 1
    if count == 1:
        with process_group(gpu) as processes:
            yield processes
        return
    torch.set_num_threads(1)
    copies: list[int] = []
    folder = tempfile.mkdtemp()
    rank = _fork(count, copies)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store = dist.FileStore(str(Path(folder) / "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        yield Processes(rank, count, torch.device("cpu"), ())
        dist.destroy_process_group()
    except BaseException:
        for copy in copies:
            os.kill(copy, signal.SIGKILL)
        raise
    finally:
        if rank == 0:
            _await(copies)
            shutil.rmtree(folder, ignore_errors=True)


def _fork(count: int, copies: list[int]) -> int:
    """Make ``count`` processes of this one; returns the rank of each, and notes in the first one's ``copies`` the ids of the others."""
    global _is_copy
    parent = os.getpid()
    for rank in range(1, count):
        copy = os.fork()
        if copy == 0:
            _is_copy = True
            copies.clear()
            # However the first process ends, no copy stays behind.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            return rank
        copies.append(copy)
    return 0


def _await(copies: list[int]) -> None:
    deadline = time.monotonic() + MAX_SECONDS_TO_END
    for copy in copies:
        while os.waitpid(copy, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(copy, signal.SIGKILL)
            time.sleep(0.01)
