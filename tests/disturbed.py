"""``train_GE.py``, and once something happens to it: what, the environment says.

SIGNAL: number of a signal that the process with rank 1, or the only one, gets after two steps; MARKER: a file that is then made, and
keeps it from happening again. LATE: seconds that this process then waits first. KILL_LOADERS: processes that load images die at their
first image.
"""

import os
import signal
import sys
import time
from pathlib import Path

import dataloader
import train_GE
from engine.stepper import Stepper

STEPS = 2


def main(argv: list[str]) -> int:
    """As of ``train_GE``."""
    if "SIGNAL" in os.environ and os.environ.get("RANK", "1") == "1":
        marker = Path(os.environ["MARKER"])
        time.sleep(float(os.environ.get("LATE", "0")) if marker.exists() else 0)
        _send_once(int(os.environ["SIGNAL"]), marker)
    if "KILL_LOADERS" in os.environ:
        _kill_loaders()
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
