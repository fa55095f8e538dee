"""One process per core where a CPU trains: forked workers with a single thread each share every batch.

Example:
    with training_processes(settings.batch_size, settings.gpu) as processes:
        ...  # once in every process

With several threads per process, every convolution ends with a barrier; one busy core stalls all of them.

Workers are forked, not started by ``torch.multiprocessing.start_processes``. There, the parent is an extra
process: it would have to forward signals, recover exit statuses from pickled traces, and hold the run's
lock. If it is killed, its workers get SIGINT, and would save and end as if the user had asked for it. Here,
rank 0 is the process that the user started. It gets the signals, its exit status is that of the run, and
its workers are killed with it.
"""

import argparse
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from engine.runtime.distributed import (
    TIMEOUT,
    Processes,
    in_thread,
    is_lost_peer,
    leave_process_group,
    process_group,
    torchrun_environment,
)
from engine.runtime.signals import SignalRequests
from parsing import at_least
from utils import UserError, available_cores, one_line

MIN_SHARE = 32  # images of a micro-batch that a process must get: batch normalisation averages over them
MAX_SECONDS_TO_END = 20
SECONDS_TO_REPORT = 5  # time for a worker to report its error
SECONDS_TO_LOOK = 0.2  # between two checks of the workers while they start
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h

_report: Path | None = None  # file for the error of this worker; None in rank 0


class WorkerFailed(Exception):
    """A worker ended with an error. The run ends with its exit status and message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def exit_worker(status: int, message: str = "") -> None:
    """In a worker, report the message to rank 0 and exit; in rank 0 do nothing."""
    if _report is None:
        return
    try:
        if message:
            _report.write_text(f"{status} {message}", encoding="utf-8")
        # Standard output may still hold text of rank 0 from before the fork, which would appear twice.
        sys.stderr.flush()
    finally:
        os._exit(status)


@contextmanager
def workers_end_inside() -> Iterator[None]:
    """End every worker at the latest where the block ends: outside, it would be a second copy of the caller.

    A worker that leaves the block by an exception prints its traceback and reports the exception to rank 0.
    """
    try:
        yield
    except BaseException as error:
        if _report is not None:
            traceback.print_exc()
            exit_worker(1, one_line(f"a worker ended with {type(error).__name__}: {error}"))
        raise
    finally:
        exit_worker(1)


def process_count(batch_size: int, accumulate: int = 1, cores: int | None = None) -> int:
    """Return the number of processes to train with on the CPU.

    It is the environment's PROCESSES, or else the largest number up to ``cores`` that divides the batch and
    leaves each process ``MIN_SHARE`` images in each of its micro-batches.

    Args:
        batch_size: Images per step of all processes.
        accumulate: Micro-batches per step of each process.
        cores: Number of cores. If None, all that this process may use.

    Raises:
        UserError: PROCESSES is not a number from 1 to ``batch_size``.
    """
    if wanted := os.environ.get("PROCESSES"):
        try:
            return at_least(1, batch_size)(wanted)
        except argparse.ArgumentTypeError as error:
            raise UserError(
                f"PROCESSES={wanted}: {error} (the processes share --batch-size images)"
            ) from None
    most = min(cores or available_cores(), batch_size // (MIN_SHARE * accumulate))
    return max((n for n in range(1, most + 1) if batch_size % n == 0), default=1)


def may_fork(gpu: tuple[int, ...] | None) -> bool:
    """Return True where workers can be forked: a program of its own on Linux that trains on the CPU.

    A worker would inherit the locks of other threads without the threads, and the terminal of an interactive
    session.
    """
    others = set(threading.enumerate()) - {threading.main_thread()}
    is_program = (
        sys.platform == "linux"
        and threading.current_thread() is threading.main_thread()
        and all(thread.daemon for thread in others)
        and not hasattr(sys, "ps1")
    )
    return is_program and torchrun_environment().world_size == 1 and not gpu and not torch.cuda.is_available()


@contextmanager
def training_processes(
    batch_size: int,
    gpu: tuple[int, ...] | None,
    requests: SignalRequests | None = None,
    accumulate: int = 1,
) -> Iterator[Processes]:
    """Run the block in every process: torchrun's, or one with GPUs, or this one and forked workers.

    A worker must end with ``exit_worker``.

    Args:
        batch_size: Images per step of all processes.
        gpu: --gpu.
        requests: Requests of ``handle_signals``, if the caller handles signals.
        accumulate: Micro-batches per step of each process.

    Raises:
        WorkerFailed: A worker ended with an error.
        UserError: PROCESSES or the variables of torchrun are wrong, a GPU does not exist, the other processes
            cannot be reached, or the system allows no further process.
    """
    count = process_count(batch_size, accumulate) if may_fork(gpu) else 1
    if count == 1:
        with process_group(gpu) as processes:
            yield processes
        return
    requests = requests or SignalRequests()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    folder = Path(tempfile.mkdtemp())
    main_process, workers, seconds_to_end = os.getpid(), [], 0
    try:
        # An exception of a signal in one of Python's functions around a fork would be dropped, and leave the
        # lock of ``logging`` taken.
        with requests.held():
            rank = _fork(count, folder, workers)
            if rank > 0:
                requests.stop_signal = 0  # it was a signal to rank 0
        _join(folder / "store", rank, count, workers)
        yield Processes(rank, count, torch.device("cpu"), ())
        leave_process_group()
        seconds_to_end = MAX_SECONDS_TO_END
    except RuntimeError as error:
        if is_lost_peer(error):
            if rank > 0:
                os._exit(1)  # without a report: another process has the reason
            _wait_for(workers, SECONDS_TO_REPORT)
            for report in folder.glob("*.report"):
                status, message = report.read_text(encoding="utf-8").split(" ", 1)
                raise WorkerFailed(int(status), message) from None
        raise
    finally:
        if os.getpid() == main_process:
            _wait_for(workers, seconds_to_end)
            shutil.rmtree(folder, ignore_errors=True)


def _fork(count: int, folder: Path, workers: list[int]) -> int:
    """Fork this process; return the rank of each process.

    Args:
        count: Number of processes, with this one.
        folder: Folder for the reports of the workers.
        workers: Gets the process ids of the workers in rank 0, also of those before one that is refused; it
            is left empty in a worker.

    Raises:
        UserError: The system does not allow that many processes.
    """
    global _report
    parent = os.getpid()
    for rank in range(1, count):
        try:
            worker = os.fork()
        except OSError as error:
            raise UserError(
                f"cannot start {count} processes: {error.strerror}; PROCESSES=1 starts no others"
            ) from None
        if worker == 0:
            _report = folder / f"{rank}.report"
            # However rank 0 ends, no worker stays behind.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            workers.clear()
            return rank
        workers.append(worker)
    return 0


def _join(store: Path, rank: int, count: int, workers: list[int]) -> None:
    """Connect with the other processes.

    Raises:
        RuntimeError: A worker ended before all were connected. Gloo notices only the loss of connected ones.
    """

    def join() -> None:
        file_store = dist.FileStore(str(store), count)
        dist.init_process_group("gloo", store=file_store, rank=rank, world_size=count, timeout=TIMEOUT)

    future = in_thread(join)
    while not wait([future], SECONDS_TO_LOOK).done:
        if any(_has_ended(worker) for worker in workers):
            raise RuntimeError("Gloo: a worker ended before all processes were connected")
    future.result()


def _has_ended(worker: int) -> bool:
    """Return True if a worker has ended; its exit status can still be read."""
    try:
        return os.waitid(os.P_PID, worker, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # whoever started this process lets it ignore SIGCHLD
        return True


def _wait_for(workers: list[int], seconds: float) -> None:
    """Wait until the workers have ended; after ``seconds`` kill the others."""
    deadline = time.monotonic() + seconds
    while workers:
        if _has_ended(workers[0]):
            with suppress(ChildProcessError):
                os.waitpid(workers[0], 0)
            workers.pop(0)
            continue
        if time.monotonic() > deadline:
            os.kill(workers[0], signal.SIGKILL)
        time.sleep(0.01)
