"""SIGINT and SIGTERM stop a run; SIGUSR1 makes it save and continue.

In training the first signal ends the step, saves, and says how to resume; elsewhere, and at a second signal,
the run stops at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """A signal stopped the run; no handler of other errors catches it.

    ``where`` says at which step, ``exit_status`` is the one to end with.
    """

    def __init__(self, signal_number: int, is_saved: bool = False, where: str = ""):
        super().__init__(signal_number)
        self.exit_status, self.is_saved, self.where = 128 + signal_number, is_saved, where


class Requests:
    """Requests that signals made.

    ``stop`` is the number of the last signal that asked to stop, 0 for none. While ``at_once`` is True it
    also raises; it is noted all the same, because Python drops exceptions that are raised in some places.
    """

    def __init__(self) -> None:
        self.stop = 0
        self.save, self.at_once = False, True


@contextmanager
def listening() -> Iterator[Requests]:
    """Handle signals within the block.

    SIGINT and SIGTERM raise ``Interrupted``, except that the first one is only noted while not ``at_once``;
    SIGUSR1 is only noted. In a thread other than the main one, where Python handles no signals, nothing is
    changed.
    """
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def stop(number: int, frame: object) -> None:
        is_first, requests.stop = not requests.stop, number
        if requests.at_once or not is_first:
            raise Interrupted(number)

    def save(number: int, frame: object) -> None:
        requests.save = True

    handlers = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGUSR1: save}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
