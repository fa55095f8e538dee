"""SIGINT, SIGTERM and the end of the terminal (SIGHUP) stop a run; SIGUSR1 makes it save and continue.

In training the first signal ends the step, saves, and says how to resume; elsewhere, and at a second signal,
the run stops at once. One that is handled within ``REPEATED_WITHIN`` seconds is the first signal again: Slurm
sends SIGTERM twice, and so do systemd and torchrun together.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from utils import UserError

REPEATED_WITHIN = 1.0


class Interrupted(BaseException):
    """A signal stopped the run; no handler of other errors catches it.

    ``where`` says at which step, ``exit_status`` is the one to end with.
    """

    def __init__(self, signal_number: int, is_saved: bool = False, where: str = ""):
        super().__init__(signal_number)
        self.exit_status, self.is_saved, self.where = 128 + signal_number, is_saved, where


class SignalRequests:
    """Requests that signals made.

    Attributes:
        stop_signal: Number of the last signal that asked to stop, 0 for none. It is noted also where it
            raises, because Python drops exceptions that are raised in some places.
        save: Whether a signal asked to save.
        is_immediate: Whether the first signal that asks to stop already raises ``Interrupted``.
        is_held: Whether no signal raises.
        has_raised: Whether a signal has raised ``Interrupted``.
        stopped_at: When the first signal that asked to stop came, by ``time.monotonic``.
    """

    def __init__(self) -> None:
        self.stop_signal, self.save, self.is_immediate, self.is_held = 0, False, True, False
        self.has_raised, self.stopped_at = False, 0.0

    def reason(self, error: BaseException) -> BaseException:
        """Return why a run ends with ``error``: the signal, where code replaced ``Interrupted`` by an error.

        Compiled code such as matplotlib's takes whatever its callbacks raise for an invalid value.
        """
        is_own = isinstance(error, (Interrupted, UserError, OSError))
        return Interrupted(self.stop_signal) if self.has_raised and not is_own else error

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Note the first signal that asks to stop, and its repetitions, within the block; a second raises."""
        with self._mode(is_immediate=False):
            yield

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Raise ``Interrupted`` at every signal that asks to stop within the block."""
        with self._mode(is_immediate=True):
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Note signals within the block, and raise ``Interrupted`` after it if one asked to stop."""
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
        if self.stop_signal:
            raise Interrupted(self.stop_signal)

    @contextmanager
    def _mode(self, is_immediate: bool) -> Iterator[None]:
        before, self.is_immediate = self.is_immediate, is_immediate
        try:
            yield
        finally:
            self.is_immediate = before


@contextmanager
def handle_signals() -> Iterator[SignalRequests]:
    """Handle signals within the block.

    SIGINT, SIGTERM and SIGHUP raise ``Interrupted``, except that the first one and its repetitions are only
    noted in a ``deferred`` block; SIGUSR1 is only noted, and SIGHUP stays ignored where it is, as under
    ``nohup``. In a thread other than the main one, where Python handles no signals, nothing is changed.
    """
    requests = SignalRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def stop(number: int, frame: object) -> None:
        if not requests.stop_signal:
            requests.stopped_at = time.monotonic()
        requests.stop_signal = number
        is_second = time.monotonic() - requests.stopped_at > REPEATED_WITHIN
        if not requests.is_held and (requests.is_immediate or is_second):
            requests.has_raised = True
            raise Interrupted(number)

    def save(number: int, frame: object) -> None:
        requests.save = True

    handlers = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGUSR1: save}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        handlers[signal.SIGHUP] = stop
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
