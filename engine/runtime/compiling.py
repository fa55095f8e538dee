"""A check that ``torch.compile`` works here: it needs a compiler, Python's headers and a writable TMPDIR.

Example:
    mode = usable_mode("default", is_required=False, processes=processes, say=log.line)
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from engine.runtime.distributed import Processes
from utils import UserError, one_line

LONGEST_REASON = 200  # characters


def usable_mode(mode: str, is_required: bool, processes: Processes, say: Callable[[str], None]) -> str:
    """Return ``mode``, or ``off`` with one line where compiling fails in one of the processes.

    Args:
        mode: Value of --compile; not ``auto``.
        is_required: The user asked for this mode.
        processes: All of them make the same choice.
        say: Prints a line of the run, once.

    Raises:
        UserError: Compiling fails, and ``is_required`` is true.
    """
    if mode == "off":
        return mode
    problem = compiler_problem(processes.device)
    if not processes.all_reduce_max(int(problem is not None)):
        return mode
    reason = problem or "it fails in another process"
    if is_required:
        raise UserError(f"--compile {mode} does not work here: {reason}; --compile off trains without")
    say(f"training is not compiled, which would make it faster: {reason}")
    return "off"


def compiler_problem(device: torch.device) -> str | None:
    """Compile and run a small function on the device; return None if that works, else the reason."""
    loggers = [
        logging.getLogger(name) for name in ("torch.utils.cpp_extension", "torch._inductor", "torch._dynamo")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:  # the caller reports the reason, in one line
        logger.setLevel(logging.CRITICAL)
    values = torch.ones(64, device=device, requires_grad=True)
    try:
        torch.compile(_probe, mode=None)(values).sum().backward()
    except Exception as error:  # of many types, by the part that fails
        return reason_of(error)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return None


def is_compiler_error(error: BaseException) -> bool:
    """Return True if ``error`` comes from ``torch.compile`` and not from the compiled code."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def _probe(values: Tensor) -> Tensor:
    return torch.sin(values) * 2 + 1


def reason_of(error: BaseException) -> str:
    """Return the part of a compiler's message that says what failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A compiler's own line says more than that of the exception about it.
    signs = ("o space left", "error:", "Error:")
    telling = [line for sign in signs for line in lines if sign in line] or lines
    return one_line((telling or [type(error).__name__])[0])[:LONGEST_REASON]
