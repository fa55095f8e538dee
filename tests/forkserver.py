"""Runs of programs in processes forked from one that has imported PyTorch and done nothing else.

ended = run(train_GE.main, ["--save", "GE"], folder)
ended.statuses, ended.output, ended.errors

Importing PyTorch takes seconds, a fork milliseconds. Unlike in ``tests.forked``, the caller may have trained.
"""

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from tests.forked import LATE_IMPORTS, be_the_program

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.disturbed", *LATE_IMPORTS])
TIMEOUT = 120  # seconds


class Ended(NamedTuple):
    """How a run ended.

    Attributes:
        statuses: Exit status by process; -N after death by signal N.
        output: Text that all processes wrote to standard output.
        errors: Text that all processes wrote to standard error.
    """

    statuses: list[int]
    output: str
    errors: str


def run(
    main: Callable[[list[str]], int],
    argv: Sequence[str],
    folder: Path,
    *environments: Mapping[str, object],
    stdout: Path | None = None,
) -> Ended:
    """Call ``main(argv)`` at the same time in one process per environment, in ``folder``.

    Args:
        main: An importable function that returns the exit status.
        argv: Arguments of the command line.
        folder: Working directory.
        environments: Variables of each process, added to those of this one; without any, one process.
        stdout: Destination of standard output, instead of ``output``.
    """
    _start_server()
    children = []
    for number, variables in enumerate(environments or ({},)):
        outputs = (stdout or f"{number}.stdout", f"{number}.stderr")
        texts = {name: str(value) for name, value in variables.items()}
        children.append(CONTEXT.Process(target=_become, args=(main, argv, folder, outputs, texts)))
    for child in children:
        child.start()
    last = time.monotonic() + TIMEOUT
    for child in children:
        child.join(max(0, last - time.monotonic()))
        child.kill()
        child.join()
    output, errors = (
        "".join(path.read_text() for path in sorted(folder.glob(f"[0-9].{name}")))
        for name in ("stdout", "stderr")
    )
    return Ended([child.exitcode for child in children], output, errors)


@functools.cache
def _start_server() -> None:
    # It looks for the modules to import in its own path.
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        forkserver.ensure_running()


def _become(
    main: Callable[[list[str]], int],
    argv: Sequence[str],
    folder: Path,
    outputs: tuple,
    environment: dict[str, str],
) -> None:
    os.environ |= environment
    be_the_program(main, "train_GE", list(argv), folder, outputs)
