"""Runs of the programs in forked children: importing PyTorch costs seconds, a fork milliseconds.

outcome = run("train_GE", ["--save", "GE"], folder)
outcome.status, outcome.errors

The parent must never train: a child inherits neither threads nor the locks they held.
"""

import contextlib
import importlib
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

PROGRAMS = ("train_GE", "train_IMTA", "predict")
MEMORY = 3 * 2**30  # bytes a child may map beyond what the parent has

# Imported by the programs when they first need them, which would be once a child.
LATE_IMPORTS = ("torch.utils.tensorboard", "torch.utils.tensorboard.summary", "matplotlib.backends.backend_agg", "PIL.PngImagePlugin")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``status`` is what it returned, -N after death by signal N, None if it had to be killed for running too long.

    ``struck`` says whether what was to happen in the middle did happen.
    """

    status: int | None
    errors: str
    seconds: float
    struck: bool


def prepare() -> None:
    """Import everything once; keep every child from the network, from GPUs and from a second thread."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PROCESSES": "1"}
    import torch
    from PIL import Image

    torch.set_num_threads(1)
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
) -> Outcome:
    """Call ``main(argv)`` of a program in a child whose working directory is ``folder``.

    Args:
        strike: called with the child's id ``after`` seconds, counted from the call of ``main``, unless the child has ended by then.
        timeout: seconds after which the child counts as hanging.
        file_size: bytes that a file it writes may have; more is an error as on a full disk.
    """
    text = folder.parent / f"{folder.name}.stderr"
    ready, note = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(ready)
        _be_the_program(program, argv, folder, text, note, file_size)
    os.close(note)
    os.read(ready, 1)
    began = time.monotonic()
    struck = hangs = False
    while True:
        ended, code = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - began
        if ended:
            break
        if strike is not None and not struck and seconds >= after:
            struck = True
            strike(child)
        elif seconds > timeout:
            hangs = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.001)
    # Nothing may outlive the program, and a worker would hold the pipe open.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    returned = os.read(ready, 1)
    os.close(ready)
    errors = text.read_text(encoding="utf-8", errors="replace")
    text.unlink()
    # What the program returned counts, even if a signal met this process on its last steps.
    status = None if hangs else returned[0] if returned else os.waitstatus_to_exitcode(code)
    return Outcome(status, errors, seconds, struck)


def _be_the_program(program: str, argv: list[str], folder: Path, text: Path, note: int, file_size: int | None) -> NoReturn:
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        for target, path in enumerate([os.devnull, os.devnull, text]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), target)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        sys.argv = [f"{program}.py", *argv]
        os.write(note, b"c")
        status = _called(sys.modules[program].main, argv)
        # From here on it is no longer the program that a signal meets.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(note, bytes([status]))
    except BaseException:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _called(main: Callable[[list[str]], int], argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
