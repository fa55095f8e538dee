"""SIGINT and SIGTERM ask a run to stop: it ends the step, saves, and says how to go on. A second one stops at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """Which signal asked to stop, if any."""

    def __init__(self) -> None:
        self.signal_number: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block the first SIGINT or SIGTERM is only noted; the next one acts as it did before."""
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        request.signal_number = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
