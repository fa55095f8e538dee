"""Runs of the programs in forked children: importing PyTorch costs seconds, a fork milliseconds.

    outcome = run("train_GE", ["--save", "GE"], folder)
    outcome.status, outcome.errors

The parent must never train: a child inherits neither threads nor the locks they held.
"""

import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

PROGRAMS = ("train_GE", "train_IMTA", "predict", "engine.convert")
SECONDS_TO_VANISH = 2
MEMORY = 3 * 2**30  # bytes a child may map beyond what the parent has
# Imported by the programs when they first need them, which would be once a child.
LATE_IMPORTS = (
    "torch.utils.tensorboard",
    "torch.utils.tensorboard.summary",
    "matplotlib.backends.backend_agg",
    "PIL.PngImagePlugin",
)
CONTEXT = multiprocessing.get_context("fork")


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        status: Exit status; -N after death by signal N; None if it was killed for running too long.
        errors: Text that it wrote to standard error.
        seconds: Seconds from the call of ``main``.
        struck: Whether what was to happen in the middle did happen.
        left: Number of its processes that still ran ``SECONDS_TO_VANISH`` after it.
    """

    status: int | None
    errors: str
    seconds: float
    struck: bool
    left: int


def prepare() -> None:
    """Import everything once; keep every child from the network, from GPUs and from a second process."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PROCESSES": "1"}
    from PIL import Image

    for name in (*PROGRAMS, *LATE_IMPORTS):
        importlib.import_module(name)
    Image.init()

    def refuse(*_: object) -> NoReturn:
        raise OSError("no network in this test")

    socket.getaddrinfo = refuse


def run(
    program: str,
    argv: list[str],
    folder: Path,
    strike: Callable[[int], object] | None = None,
    after: float = 0.0,
    timeout: float = 120.0,
    file_size: int | None = None,
    processes: int = 1,
) -> Outcome:
    """Call ``main(argv)`` of a program in a child whose working directory is ``folder``.

    Args:
        strike: Function that is called with the child's id ``after`` seconds, counted from the call of
            ``main``, unless the child has ended by then.
        timeout: Seconds after which the child counts as hanging.
        file_size: Bytes that a file it writes may have; more is an error as on a full disk.
        processes: Number of processes that train together.
    """
    text, ready = folder.parent / f"{folder.name}.stderr", CONTEXT.Event()

    def main(argv: list[str]) -> int:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        os.environ["PROCESSES"] = str(processes)
        ready.set()
        return sys.modules[program].main(argv)

    child = CONTEXT.Process(target=be_the_program, args=(main, program, argv, folder, (os.devnull, text)))
    child.start()
    if not ready.wait(timeout):
        child.kill()
    began = time.monotonic()
    child.join(after if strike else 0)
    struck = strike is not None and child.is_alive()
    if struck:
        strike(child.pid)
    child.join(timeout)
    hangs, seconds = child.is_alive(), time.monotonic() - began
    left = _wait_for_group(child.pid) if not hangs else 0
    # Nothing may outlive the program.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.join()
    errors = text.read_text(encoding="utf-8", errors="replace")
    text.unlink()
    return Outcome(None if hangs else child.exitcode, errors, seconds, struck, left)


def workers_of(process: int) -> list[int]:
    """Return the ids of the processes that a process has forked."""
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def _wait_for_group(group: int) -> int:
    """Wait until no process of the group runs; return how many still do after ``SECONDS_TO_VANISH``."""
    last = time.monotonic() + SECONDS_TO_VANISH
    while (left := _count_group(group)) and time.monotonic() < last:
        time.sleep(0.05)
    return left


def _count_group(group: int) -> int:
    count = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            count += int(its_group) == group and state not in "ZX"
    return count


def be_the_program(
    main: Callable[[list[str]], int], program: str, argv: list[str], folder: Path, outputs: tuple
) -> NoReturn:
    """Become a process group that calls ``main``, and end as the program does.

    ``outputs`` are the files for standard output and standard error.
    """
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        for target, path in enumerate([os.devnull, *outputs]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), target)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        sys.argv = [f"{program}.py", *argv]
        status = main(argv)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # From here on it is no longer the program that a signal meets.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(status)
