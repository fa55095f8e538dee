"""Saving and stopping within an epoch: at signals, and every N steps or minutes.

Example:
    interruptions = Interruptions(session, save, where)
    with session.requests.deferred():
        for images, targets in interruptions.batches(batches, has_steps):
            ...
            interruptions.after_step(step, steps_per_epoch)
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TypeVar

from engine.runtime.signals import Interrupted
from engine.session import Session
from utils import UserError

# Check for signals at least every N steps; a process that is asked to stop has perhaps half a minute.
MAX_STEPS_BETWEEN_CHECKS = 10
# A request that processes share is 0 for none, this one, or this plus the number of the signal that stops the
# run. All of them do what the largest request of any says.
SAVE = 1

_T = TypeVar("_T")


class Interruptions:
    """Saves and stops a training at the same step in all its processes.

    Args:
        session: The run.
        save: Saves the training in the middle of an epoch.
        where: Returns where the training is, for the line that a stopped run prints.
    """

    def __init__(self, session: Session, save: Callable[[], None], where: Callable[[], str]):
        self.settings, self.processes, self.requests = session.settings, session.processes, session.requests
        self.save, self.where = save, where
        self.saved_at = 0.0

    def batches(self, batches: Iterator[_T], has_steps: Callable[[], bool]) -> Iterator[_T]:
        """Yield batches. Where there is no other process, a signal also ends the wait for the next one.

        An image that cannot be read ends the run. Without other processes, which may not know of it, the
        steps of the epoch are saved first.

        Args:
            batches: The batches that are left of an epoch.
            has_steps: Returns whether steps of this epoch are done, which have to be saved.

        Raises:
            Interrupted: A signal came during the wait.
            UserError: An image cannot be read.
        """
        self.saved_at = time.monotonic()  # at the end of the previous epoch
        is_alone = self.processes.world_size == 1
        while True:
            try:
                with self.requests.immediate() if is_alone else nullcontext():
                    batch = next(batches, None)
            except Interrupted:
                if is_saved := has_steps():
                    self.save()
                raise Interrupted(self.requests.stop_signal, is_saved, self.where()) from None
            except UserError:
                if is_alone and has_steps():
                    self.save()
                raise
            if batch is None:
                return
            yield batch

    def after_step(self, step: int, steps_per_epoch: int) -> None:
        """Save where that is due after a step, and stop where a signal asked for it.

        After the last step of an epoch, its end does both.

        Raises:
            Interrupted: A signal asked to stop; everything is saved.
        """
        request, every = self._shared_request(step), self.settings.save_every_steps
        if step == steps_per_epoch:
            return
        if request or (every and step % every == 0):
            self.save()
            self.saved_at = time.monotonic()
        if request > SAVE:
            # torchrun ends the other processes when one ends: the main process must have written the file.
            self.processes.all_reduce_max(0)
            raise Interrupted(request - SAVE, True, self.where())

    def stop_signal(self) -> int:
        """Return the number of the signal that asked a process to stop, 0 for none; all processes wait."""
        return self.processes.all_reduce_max(self.requests.stop_signal)

    def _shared_request(self, step: int) -> int:
        # Asking each other costs a wait, so processes do it only now and then.
        every = min(self.settings.print_freq, MAX_STEPS_BETWEEN_CHECKS)
        if self.processes.world_size > 1 and step % every:
            return 0
        minutes = self.settings.save_every_minutes
        is_time = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        save, self.requests.save = self.requests.save or is_time, False
        stop = self.requests.stop_signal
        return self.processes.all_reduce_max(SAVE + stop if save or stop else 0)
