"""The output of a run: lines and a progress bar on the terminal, one JSON line per epoch, TensorBoard.

Lines go through ``logging``, to the logger ``imta_msdnet``; a program that calls ``train_GE.main``
may add its own handlers.
"""

import json
import logging
import sys
import threading
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils import atomic_write, duration, is_terminal, print_line

LOGGER = logging.getLogger("imta_msdnet")


class ConsoleHandler(logging.Handler):
    """A handler that prints lines on standard output, above a progress bar if there is one.

    If standard output is closed or full, lines are dropped.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        with tqdm.external_write_mode(nolock=True):
            print_line(self.format(record))


class Log:
    """Output of the main process; with ``enabled=False``, in the others, nothing is written."""

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.writer: SummaryWriter | None = None
        self._excepthook = threading.excepthook
        self._bar: tqdm | None = None  # made after the workers are forked, as it starts a thread
        if not any(isinstance(handler, ConsoleHandler) for handler in LOGGER.handlers):
            LOGGER.addHandler(ConsoleHandler())
            LOGGER.setLevel(logging.INFO)
            LOGGER.propagate = False

    def line(self, text: str) -> None:
        """Print a line."""
        if self.enabled:
            LOGGER.info("%s", text)

    def open(self, folder: Path, first_step: int) -> None:
        """Begin or continue TensorBoard's events; drop an earlier attempt's events from ``first_step`` on."""
        if self.enabled:
            threading.excepthook = _ignore_failed_writes  # until ``close``
            self.writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def close(self) -> None:
        """Close the progress bar and the TensorBoard writer."""
        self.end_epoch()
        if self.writer is not None:
            self.writer.close()
            threading.excepthook = self._excepthook

    def begin_epoch(self, title: str, first_step: int, steps: int) -> None:
        """Show a bar if standard error is a terminal; a log file gets lines instead."""
        is_shown = self.enabled and is_terminal(sys.stderr)
        self._bar = tqdm(
            total=steps, initial=first_step, desc=title, unit="step", leave=False, disable=not is_shown
        )
        self._title, self._steps, self._start, self._first_step = title, steps, time.monotonic(), first_step

    def advance(self) -> None:
        """Move the bar by a step."""
        self._bar.update(1)

    def step(self, done: int, batch_size: int, summary: str) -> None:
        """Report losses and speed after ``done`` of an epoch's steps."""
        seconds_per_step = (time.monotonic() - self._start) / max(done - self._first_step, 1)
        speed = f"{batch_size / seconds_per_step:,.0f} images/s"
        self._bar.set_postfix_str(f"{summary}, {speed}")
        if self._bar.disable:
            left = duration(seconds_per_step * (self._steps - done))
            self.line(f"{self._title} {done}/{self._steps}  {summary}  {speed}  {left} left")

    def end_epoch(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def write_history(self, path: Path, history: list[dict]) -> None:
        """Write every epoch's row as a JSON line, so that the file always agrees with its checkpoint."""
        if self.enabled:
            with atomic_write(path) as stream:
                stream.writelines(json.dumps(row) + "\n" for row in history)

    def scalars(self, row: dict, step: int) -> None:
        """Write an epoch's numbers to TensorBoard, lists as one curve per exit."""
        if self.writer is None:
            return
        for name, value in row.items():
            if isinstance(value, list):
                for k, element in enumerate(value, start=1):
                    self.writer.add_scalar(f"{name}/exit_{k}", element, step)
            elif isinstance(value, (int, float)) and name != "epoch":
                self.writer.add_scalar(name, value, step)


def _ignore_failed_writes(failure: threading.ExceptHookArgs) -> None:
    """Print no trace of TensorBoard's thread: it keeps unwritten events for the next call."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)
