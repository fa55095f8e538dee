"""One process a core where a CPU trains: forked copies of this one, each with a single thread, that share every batch.

with shared_out(settings.batch_size, settings.gpu) as processes: ...   # runs once in every process

Two threads of one process would wait for each other in every convolution, and very long where another program uses a core.
"""

import argparse
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

from engine.distributed import TIMEOUT, Processes, is_lost_peer, process_group
from settings import available_cores
from utils import UserError, at_least

MIN_SHARE = 32  # images of a step that a process must get: batch normalisation averages over them
MAX_SECONDS_TO_END = 20
SECONDS_TO_REPORT = 5  # that a copy with an error gets to say so
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h

_report: Path | None = None  # where a forked copy says why it ended; None in the first process


class CopyEnded(Exception):
    """A forked copy ended for a reason of its own: the exit status and the line that the run ends with."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def leave_copy(status: int, message: str = "") -> None:
    """End this process if it is a forked copy, whose first process hears of the ``message``: what follows belongs to that one alone."""
    if _report is not None:
        if message:
            _report.write_text(f"{status} {message}", encoding="utf-8")
        os._exit(status)


def process_count(batch_size: int) -> int:
    """Processes to train with on the CPU: the environment's PROCESSES, else as many as there are cores and the batch can be shared by.

    Raises:
        UserError: PROCESSES is no number, or more than there are images in a batch.
    """
    if wanted := os.environ.get("PROCESSES"):
        try:
            return at_least(1, batch_size)(wanted)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"PROCESSES={wanted}: {error} (--batch-size images are shared)") from None
    return max(
        n
        for n in range(1, available_cores() + 1)
        if n == 1 or (batch_size % n == 0 and batch_size // n >= MIN_SHARE)
    )


@contextmanager
def shared_out(batch_size: int, gpu: tuple[int, ...] | None) -> Iterator[Processes]:
    """The processes of a training: torchrun's, or GPUs of this process, or forked copies of it, one a core.

    The block runs in every process; a copy ends with ``leave_copy``.

    Raises:
        CopyEnded: a copy met an error that this process did not.
        UserError: as ``process_group`` and ``process_count``; no process can be started.
    """
    is_alone = (
        int(os.environ.get("WORLD_SIZE", "1")) == 1
        and not torch.cuda.is_available()
        and not gpu
        and sys.platform == "linux"
    )
    count = process_count(batch_size) if is_alone else 1
    if count == 1:
        with process_group(gpu) as processes:
            yield processes
        return
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    rank, copies = _fork(count, folder)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    seconds_to_end = 0
    try:
        store = dist.FileStore(str(folder / "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=TIMEOUT)
        yield Processes(rank, count, torch.device("cpu"), ())
        dist.destroy_process_group()
        seconds_to_end = MAX_SECONDS_TO_END
    except RuntimeError as error:
        if is_lost_peer(error):
            if rank > 0:
                os._exit(1)  # without a report: another process has the reason
            _await(copies, SECONDS_TO_REPORT)
            for report in folder.glob("*.report"):
                status, message = report.read_text(encoding="utf-8").split(" ", 1)
                raise CopyEnded(int(status), message) from None
        raise
    finally:
        if rank == 0:
            _await(copies, seconds_to_end)
            shutil.rmtree(folder, ignore_errors=True)


def _fork(count: int, folder: Path) -> tuple[int, list[int]]:
    """Make ``count`` processes of this one; gives each its rank, and the first one the ids of the others.

    Raises:
        UserError: the system does not allow so many.
    """
    global _report
    parent, copies = os.getpid(), []
    for rank in range(1, count):
        try:
            copy = os.fork()
        except OSError as error:
            raise UserError(
                f"cannot start {count} processes: {error.strerror}; PROCESSES=1 starts no others"
            ) from None
        if copy == 0:
            _report = folder / f"{rank}.report"
            # However the first process ends, no copy stays behind.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            return rank, []
        copies.append(copy)
    return 0, copies


def _await(copies: list[int], seconds: float) -> None:
    """Wait for the copies; those that still run after so many ``seconds`` are killed."""
    deadline = time.monotonic() + seconds
    while copies:
        if os.waitpid(copies[0], os.WNOHANG)[0]:
            copies.pop(0)
            continue
        if time.monotonic() > deadline:
            os.kill(copies[0], signal.SIGKILL)
        time.sleep(0.01)
