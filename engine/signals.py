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


class Requests:
    """What signals asked for: ``stop`` is the number of the last one that asked to stop, 0 for none. While ``at_once`` it acts, too; it is
    noted all the same, as Python drops what is raised in some places."""

    def __init__(self) -> None:
        self.stop = 0
        self.save, self.at_once = False, True


@contextmanager
def listening() -> Iterator[Requests]:
    """Within the block SIGINT and SIGTERM raise ``Interrupted``, but while not ``at_once`` the first one is only noted; so is SIGUSR1."""
    requests = Requests()

    def stop(number: int, frame: object) -> None:
        is_first, requests.stop = not requests.stop, number
        if requests.at_once or not is_first:
            raise Interrupted(number)

    def save(number: int, frame: object) -> None:
        requests.save = True

    before = {
        number: signal.signal(number, act)
        for number, act in ((signal.SIGINT, stop), (signal.SIGTERM, stop), (signal.SIGUSR1, save))
    }
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
