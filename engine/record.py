"""The record of a run: what lies where in its directory, and ``run.json``, how each piece of it was made.

Example:
    with RunDirectory(path).lock():
        with recorded(session, command, resumed=False, frozen_digest=None): ...
"""

import fcntl
import json
import os
import platform
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from engine.runtime.distributed import Processes
from engine.runtime.log import Log
from engine.runtime.signals import SignalRequests
from models.files import BEST
from utils import UserError, atomic_write, print_error


class RunDirectory:
    """The names of the files of a run."""

    def __init__(self, path: Path):
        self.path = path
        self.last = path / "last.pt"
        self.best = path / BEST
        self.log = path / "log.jsonl"
        self.record = path / "run.json"
        self.anytime = path / "anytime.csv"
        self.budgeted = path / "budgeted.csv"
        self.optimised = path / "optimised.csv"
        self.ensemble = path / "ensemble.csv"
        self.policy = path / "policy.json"
        self.reference = path / "reference.safetensors"
        self.runtime = path / "runtime.csv"
        self.runtime_picture = path / "runtime.png"
        self.deadlines = path / "deadline.csv"
        self.examples = path / "examples.png"
        self.curves = path / "curves.png"
        self.tensorboard = path / "tensorboard"

    @property
    def files(self) -> list[Path]:
        """Every file that a run writes: checkpoints, network, log, tables and figures.

        TensorBoard's events are in a folder of their own.
        """
        return [value for name, value in vars(self).items() if name not in ("path", "tensorboard")]

    def holds_run(self) -> bool:
        """Return True if something was trained here."""
        return self.last.exists() or self.best.exists() or self.log.exists()

    def refuse_second(self) -> None:
        """Raise a ``UserError`` if something was trained here."""
        if self.holds_run():
            raise UserError(
                f"{self.path} holds a run; --resume continues it, --overwrite starts again, "
                "--save DIR goes elsewhere"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of this directory until the block ends; the lock of a killed process is free.

        Raises:
            UserError, OSError: Another run writes here, or the directory cannot be made. Where locking is
                impossible, a line says so.
        """
        try:
            str(self.path).encode()  # TensorBoard writes into no other folders
        except UnicodeEncodeError:
            raise UserError(
                f"cannot write into --save {str(self.path)!a}: its name is not valid UTF-8"
            ) from None
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        owner = os.getpid()
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as stream:
            try:
                # A lock of this process alone: a worker outlives a killed run
                # by seconds, and would keep what flock locks.
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(
                    f"another run is writing into {self.path}; choose another --save or wait for it"
                ) from None
            except OSError as error:
                print_error(
                    f"the file system of --save {self.path} has no locks ({error.strerror}): "
                    "make sure that no other run writes there"
                )
            self._clear_leftovers()
            try:
                yield
            finally:
                if missing and os.getpid() == owner:  # not in a forked worker
                    self._remove_if_empty(missing)

    def _clear_leftovers(self) -> None:
        """Remove what a killed run was writing."""
        for path in self.files:
            for leftover in self.path.glob(f".{path.name}.*.tmp"):
                leftover.unlink(missing_ok=True)

    def _remove_if_empty(self, made: list[Path]) -> None:
        """Remove the folders that were made for a run that was then refused."""
        with suppress(OSError):  # another run has come into one of the folders above, or they are gone
            if [path.name for path in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                for folder in made:
                    folder.rmdir()


@dataclass(frozen=True)
class Session:
    """The run that a program trains or evaluates, for all its parts.

    Attributes:
        directory: The directory of the run.
        settings: The settings of the run, all resolved.
        processes: The processes that share it.
        log: Log of the run.
        requests: Requests that signals made.
        may_train_eagerly: Whether to train without compiled code where compiling the step fails.
    """

    directory: RunDirectory
    settings: Namespace
    processes: Processes
    log: Log
    requests: SignalRequests = field(default_factory=SignalRequests)
    may_train_eagerly: bool = False


@contextmanager
def recorded(session: Session, command: str, resumed: bool, frozen_digest: str | None) -> Iterator[None]:
    """Record a piece of a run in ``run.json``: how it was started, and how and when it ended.

    Args:
        session: The run.
        command: The command line of this piece.
        resumed: Whether the run continues, and the pieces that are in the file stay.
        frozen_digest: Digest of the network that stage 2 keeps frozen.
    """
    path = session.directory.record
    piece = {
        "command": command,
        "began": _now(),
        "ended": None,
        "complete": False,
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in session.processes.gpu_ids],
        "processes": session.processes.world_size,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "commit": git_commit(),
    }
    run = {
        "settings": to_plain_types(session.settings),
        "frozen_digest": frozen_digest,
        "pieces": [*(_pieces(path) if resumed else []), piece],
    }
    _write(path, run)
    try:
        yield
        piece["complete"] = True
    finally:
        piece["ended"] = _now()
        # A full disk must not hide what went wrong before.
        with nullcontext() if piece["complete"] else suppress(UserError):
            _write(path, run)


def to_plain_types(settings: Namespace) -> dict[str, Any]:
    """Return settings in plain types, as checkpoints and ``run.json`` keep them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}


def git_commit() -> str | None:
    """Return the commit of the code, with ``-dirty`` if it was changed since; None outside a git clone."""
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True, check=False, timeout=60
        ).returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return name + "-dirty" * (changed != 0)


def _write(path: Path, run: dict[str, Any]) -> None:
    with atomic_write(path) as stream:
        json.dump(run, stream, indent=1)
        stream.write("\n")


def _pieces(path: Path) -> list[dict[str, Any]]:
    # A record that was lost or damaged is no reason to lose the run.
    try:
        pieces = json.loads(path.read_text(encoding="utf-8"))["pieces"]
        return [piece for piece in pieces if isinstance(piece, dict)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _processor_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
