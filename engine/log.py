"""What a run tells: lines and a progress bar on the terminal, one JSON line an epoch, TensorBoard."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.run_directory import RunDirectory
from utils import atomic_write, duration, is_terminal, tell

SECONDS_TO_REMIND = 8


class Log:
    """Output of the main process; the other ones are silent."""

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.writer: Any = None
        self._bar = tqdm(disable=True)

    def line(self, text: str) -> None:
        """One line on standard output, above a progress bar if there is one."""
        if self.enabled:
            with tqdm.external_write_mode(nolock=True):
                tell(text)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what the block does, and every few seconds that it still does."""
        self.line(what)
        ended, began = threading.Event(), time.monotonic()

        def remind() -> None:
            while not ended.wait(SECONDS_TO_REMIND):
                self.line(f"  still at it after {time.monotonic() - began:.0f} s")

        reminder = threading.Thread(target=remind, daemon=True)
        reminder.start()
        try:
            yield
        finally:
            ended.set()
            reminder.join()

    def open(self, run: RunDirectory, first_step: int) -> None:
        """Begin or continue TensorBoard's events; those from ``first_step`` on, of an interrupted attempt, are dropped."""
        if self.enabled:
            # Takes seconds to import, which evaluation need not wait for.
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _leave_to_the_next_call
            self.writer = SummaryWriter(str(run.tensorboard), purge_step=first_step or None)

    def close(self) -> None:
        """End the bar and the events."""
        self.end_epoch()
        if self.writer is not None:
            self.writer.close()

    def begin_epoch(self, title: str, first_step: int, steps: int) -> None:
        """Show a bar on a terminal; a log file gets lines instead."""
        is_shown = self.enabled and is_terminal(sys.stderr)
        self._bar = tqdm(
            total=steps, initial=first_step, desc=title, unit="step", leave=False, disable=not is_shown
        )
        self._title, self._steps, self._start, self._first_step = title, steps, time.monotonic(), first_step

    def advance(self) -> None:
        """Move the bar by a step."""
        self._bar.update(1)

    def step(self, done: int, batch_size: int, summary: str) -> None:
        """Report after ``done`` of an epoch's steps."""
        seconds_a_step = (time.monotonic() - self._start) / max(done - self._first_step, 1)
        self._bar.set_postfix_str(f"{summary}, {batch_size / seconds_a_step:,.0f} images/s")
        if self._bar.disable:
            left = duration(seconds_a_step * (self._steps - done))
            self.line(
                f"{self._title} {done}/{self._steps}  {summary}  {batch_size / seconds_a_step:,.0f} images/s  {left} left"
            )

    def end_epoch(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def write_history(self, path: Path, history: list[dict]) -> None:
        """Write every epoch's row as a JSON line; the file always agrees with the checkpoint it came with."""
        if self.enabled:
            with atomic_write(path) as stream:
                stream.writelines(json.dumps(row) + "\n" for row in history)

    def scalars(self, row: dict, step: int) -> None:
        """An epoch's numbers to TensorBoard, lists as one curve an exit."""
        if self.writer is None:
            return
        for name, value in row.items():
            if isinstance(value, list):
                for k, element in enumerate(value, start=1):
                    self.writer.add_scalar(f"{name}/exit_{k}", element, step)
            elif isinstance(value, (int, float)) and name != "epoch":
                self.writer.add_scalar(name, value, step)


def _leave_to_the_next_call(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread keeps what it cannot write for the next call, and would print it with a trace as well."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)
