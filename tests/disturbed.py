"""``train_GE.py`` on few images of the demo, and once something happens to it: what, the environment says.

SIGNAL: number of a signal that the process with rank 1, or the only one, gets after two steps; MARKER: a file
that is then made, and keeps it from happening again. LATE: seconds that this process then waits first.
COPY_FAILS: forked copies meet an image that cannot be read. COPY_DIES: they are killed before they meet.
COPY_BREAKS: they meet a bug. RETURNS: a file that gets a line whenever ``train_GE.main`` ends.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

import train_GE
from engine.stepper import Stepper
from image_data import synthetic
from utils import UserError

STEPS = 2
# Two processes cannot have equally many of the test images.
synthetic.DEMO_IMAGES = {"train": 160, "test": 99}


def main(argv: list[str]) -> int:
    """Run ``train_GE.main`` with the disturbance that the environment asks for."""
    if "SIGNAL" in os.environ and os.environ.get("RANK", "1") == "1":
        marker = Path(os.environ["MARKER"])
        time.sleep(float(os.environ.get("LATE", "0")) if marker.exists() else 0)
        _send_once(int(os.environ["SIGNAL"]), marker)
    if "COPY_FAILS" in os.environ:
        _raise_in_copies(UserError("cannot read the image bad.jpg"))
    if "COPY_BREAKS" in os.environ:
        _raise_in_copies(ZeroDivisionError("a bug"))
    if "COPY_DIES" in os.environ:
        _die_in_copies()
    try:
        return train_GE.main(argv)
    finally:
        if "RETURNS" in os.environ:
            with Path(os.environ["RETURNS"]).open("a") as stream:
                stream.write("returned\n")


def _send_once(number: int, marker: Path) -> None:
    real, steps = Stepper.step, 0

    def step(stepper, *arguments):
        nonlocal steps
        real(stepper, *arguments)
        steps += 1
        if steps == STEPS and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), number)

    Stepper.step = step


def _raise_in_copies(error: Exception) -> None:
    real, program = Stepper.step, os.getpid()

    def step(*arguments):
        if os.getpid() != program:
            raise error
        real(*arguments)

    Stepper.step = step


def _die_in_copies() -> None:
    real, program = dist.init_process_group, os.getpid()

    def init_process_group(*arguments, **options):
        if os.getpid() != program:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments, **options)

    dist.init_process_group = init_process_group


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
