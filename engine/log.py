"""What a run tells: lines and a progress bar on the terminal, one JSON line an epoch, TensorBoard."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.run_directory import RunDirectory
from utils import UserError, atomic_write, duration, tell

SECONDS_TO_REMIND = 8


class Log:
    """Output of the main process; the other ones are silent."""

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.writer: _Events | None = None
        self._bar: tqdm | None = None

    def line(self, text: str) -> None:
        """One line on standard output, above a progress bar if there is one."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.clear()
        tell(text)
        if self._bar is not None:
            self._bar.refresh()

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
            self.writer = _Events(run.tensorboard, first_step)

    def close(self) -> None:
        """End the bar and the events."""
        self.end_epoch()
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()

    def begin_epoch(self, title: str, first_step: int, steps: int) -> None:
        """Show a bar on a terminal; a log file gets lines instead."""
        if self.enabled and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, desc=title, unit="step", leave=False)
        self._title, self._steps, self._start, self._first_step = title, steps, time.monotonic(), first_step

    def advance(self) -> None:
        """Move the bar by a step."""
        if self._bar is not None:
            self._bar.update(1)

    def step(self, done: int, batch_size: int, summary: str) -> None:
        """Report after ``done`` of an epoch's steps."""
        seconds_a_step = (time.monotonic() - self._start) / max(done - self._first_step, 1)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{summary}, {batch_size / seconds_a_step:,.0f} images/s")
        else:
            left = duration(seconds_a_step * (self._steps - done))
            self.line(f"{self._title} {done}/{self._steps}  {summary}  {batch_size / seconds_a_step:,.0f} images/s  {left} left")

    def end_epoch(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

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


class _Events:
    """TensorBoard's ``SummaryWriter``, with the same methods; what it cannot write is a UserError."""

    def __init__(self, folder: Path, first_step: int):
        # Takes seconds to import, which evaluation need not wait for.
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        # Its thread leaves an error to the next call, and would print it with a trace as well.
        self._hook, threading.excepthook = threading.excepthook, self._keep_quiet
        try:
            self._writer = self._guarded(SummaryWriter)(str(folder), purge_step=first_step or None)
        except UserError:
            threading.excepthook = self._hook
            raise

    def __getattr__(self, name: str) -> Any:
        return self._guarded(getattr(self._writer, name))

    def close(self) -> None:
        try:
            self._guarded(self._writer.close)()
        finally:
            threading.excepthook = self._hook

    def _guarded(self, function: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            try:
                return function(*args, **options)
            except OSError as error:
                raise UserError(f"cannot write TensorBoard's events into {self._folder}: {error.strerror or error}") from None

        return call

    def _keep_quiet(self, failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.exc_value, OSError):
            self._hook(failure)
