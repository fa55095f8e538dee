"""What every part of a run needs to know, in one piece."""

from dataclasses import dataclass

from engine.distributed import Processes
from engine.log import Log
from engine.run_directory import RunDirectory
from settings import Settings


@dataclass(frozen=True)
class Session:
    """A run at work: where its files lie, what it was told, which processes share it, and where it tells what happens."""

    run: RunDirectory
    settings: Settings
    processes: Processes
    log: Log
