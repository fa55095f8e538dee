"""What every part of a run needs to know, in one piece."""

from dataclasses import dataclass, field

from engine.distributed import Processes
from engine.log import Log
from engine.run_directory import RunDirectory
from engine.signals import Requests
from settings import Settings


@dataclass(frozen=True)
class Session:
    """A run at work: where its files lie, what it was told, which processes share it, where it tells what happens, what signals ask for."""

    run: RunDirectory
    settings: Settings
    processes: Processes
    log: Log
    requests: Requests = field(default_factory=Requests)
