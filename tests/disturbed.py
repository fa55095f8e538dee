"""``train_GE.py`` on few images of the demo, and once something happens to it: what, the environment says.

SIGNAL: number of a signal that the process with rank 1, or the only one, gets after two steps; MARKER: a file that is then made, and
keeps it from happening again. LATE: seconds that this process then waits first. KILL_LOADERS: processes that load images die at their
first image. COPY_FAILS: forked copies meet an image that cannot be read.
"""

import os
import signal
import sys
import time
from pathlib import Path

import dataloader
import engine.launch
import train_GE
from engine.stepper import Stepper
from image_data import sources as datasets
from utils import UserError

STEPS = 2
# Two processes cannot have equally many of the test images.
datasets.DEMO_IMAGES = {"train": 160, "test": 99}


def main(argv: list[str]) -> int:
    """As of ``train_GE``."""
    if "SIGNAL" in os.environ and os.environ.get("RANK", "1") == "1":
        marker = Path(os.environ["MARKER"])
        time.sleep(float(os.environ.get("LATE", "0")) if marker.exists() else 0)
        _send_once(int(os.environ["SIGNAL"]), marker)
    if "KILL_LOADERS" in os.environ:
        _kill_loaders()
    if "COPY_FAILS" in os.environ:
        _fail_in_copies()
    return train_GE.main(argv)


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


def _kill_loaders() -> None:
    real, parent = dataloader._ImageFiles.__getitem__, os.getpid()

    def getitem(files, key):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(files, key)

    dataloader._ImageFiles.__getitem__ = getitem


def _fail_in_copies() -> None:
    real = Stepper.step

    def step(*arguments):
        if engine.launch._report is not None:
            raise UserError("cannot read the image bad.jpg")
        real(*arguments)

    Stepper.step = step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
