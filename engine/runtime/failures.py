"""Exit statuses and messages of runs that end early."""

from typing import TYPE_CHECKING

import torch.distributed as dist

from engine.runtime.compiling import is_compiler_error, reason_of
from engine.runtime.device import is_out_of_memory
from engine.runtime.distributed import is_lost_peer
from engine.runtime.launch import WorkerFailed
from engine.runtime.signals import Interrupted
from models.errors import first_line
from utils import UserError, error_message

if TYPE_CHECKING:
    from settings.command_line import CommandLine


ONE_VALUE = "Expected more than 1 value per channel when training"  # PyTorch's error


def status_and_line(error: Exception | Interrupted, command: "CommandLine") -> tuple[int, str]:
    """Return the exit status of a run that ``error`` ended, and the line that says why.

    Returns:
        1 when a process that the run needs was lost; 2 after a mistake; 129, 130 or 143 after SIGHUP,
        SIGINT or SIGTERM.

    Raises:
        Exception: ``error`` itself, if none of these explains it: it is a bug.
    """
    # A script cannot see the flags of torchrun, such as the address of the first machine.
    launcher = "torchrun [its flags as before]" if dist.is_torchelastic_launched() else "python"
    resume = "" if "evalmode" in command.typed else f"; to resume: {command.to_resume(launcher)}"
    if isinstance(error, (UserError, OSError)):
        return 2, error_message(error)
    if isinstance(error, WorkerFailed):
        return error.status, str(error)
    if isinstance(error, Interrupted):
        saved = "saved" if error.is_saved else "what was saved before stays"
        return error.exit_status, f"stopped by a signal{error.where}, {saved}{resume}"
    if isinstance(error, ValueError) and ONE_VALUE in str(error):
        return 2, (
            "a micro-batch has one value per channel, from which batch normalisation cannot learn; use a "
            "larger --batch-size, a smaller --accumulate or fewer processes"
        )
    if isinstance(error, (MemoryError, RuntimeError)):
        if is_out_of_memory(error):
            of_training = ", a larger --accumulate, or --checkpoint-activations"
            more = "" if "evalmode" in command.typed else of_training
            return 2, f"there is not enough memory; try a smaller --batch-size{more}"
        if is_lost_peer(error):
            return 1, f"another process of this run was lost ({first_line(error)[:200]}){resume}"
        if is_compiler_error(error):
            reason = reason_of(error)
            return 2, f"the training step cannot be compiled: {reason}; --compile off trains without"
    raise error
