"""SIGINT and SIGTERM ask a run to stop: in training it ends the step, saves, and says how to go on; elsewhere, and at a second signal, it
stops at once. SIGUSR1 asks it to save and go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """A signal stopped the run ``where`` it says; ``exit_status`` is the one to end with. No handler of other errors catches it."""

    def __init__(self, signal_number: int, is_saved: bool = False, where: str = ""):
        super().__init__(signal_number)
        self.exit_status, self.is_saved, self.where = 128 + signal_number, is_saved, where


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM raise ``Interrupted``."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Requests:
    """What signals asked for: ``stop`` is the number of the first one that asked to stop, 0 for none. While ``at_once`` that one acts, too;
    it is noted all the same, as Python drops what is raised in some places."""

    def __init__(self) -> None:
        self.stop = 0
        self.save = self.at_once = False


@contextmanager
def note_signals() -> Iterator[Requests]:
    """Within the block the first SIGINT or SIGTERM is only noted, and the next one acts as it did before; SIGUSR1 is always noted."""
    requests = Requests()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def note_stop(number: int, frame: object) -> None:
        requests.stop = number
        for stopping in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stopping, before[stopping])
        if requests.at_once:
            signal.raise_signal(number)

    def note_save(number: int, frame: object) -> None:
        requests.save = True

    signal.signal(signal.SIGINT, note_stop)
    signal.signal(signal.SIGTERM, note_stop)
    signal.signal(signal.SIGUSR1, note_save)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
