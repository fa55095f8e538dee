"""The directory of a run: the names of its files, and a lock that keeps other runs out.

Example:
    with RunDirectory(path).lock(): ...
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from models.files import BEST
from utils import UserError, print_error


class RunDirectory:
    """The names of the files of a run."""

    def __init__(self, path: Path):
        self.path = path
        self.lock_file = path / ".lock"
        self.last = path / "last.pt"
        self.best = path / BEST
        self.log_file = path / "log.jsonl"
        self.run_json = path / "run.json"
        self.anytime = path / "anytime.csv"
        self.budgeted = path / "budgeted.csv"
        self.optimised = path / "optimised.csv"
        self.ensemble = path / "ensemble.csv"
        self.policy = path / "policy.json"
        self.reference = path / "reference.safetensors"
        self.runtime = path / "runtime.csv"
        self.runtime_figure = path / "runtime.png"
        self.deadlines = path / "deadline.csv"
        self.examples = path / "examples.png"
        self.curves = path / "curves.png"
        self.tensorboard = path / "tensorboard"

    @property
    def files(self) -> list[Path]:
        """Every file that a run writes: checkpoints, network, log, tables and figures.

        TensorBoard's events are in a folder of their own.
        """
        return [
            *(self.last, self.best, self.log_file, self.run_json),
            *(self.anytime, self.budgeted, self.optimised, self.ensemble, self.policy, self.reference),
            *(self.runtime, self.runtime_figure, self.deadlines, self.examples, self.curves),
        ]

    def sessions(self) -> list[dict[str, Any]]:
        """Return the sessions in ``run.json``, the oldest first; none if the file is damaged."""
        try:
            run = json.loads(self.run_json.read_text(encoding="utf-8"))
            sessions = run["pieces"] if "pieces" in run else run["sessions"]  # "pieces" in older files
            return [session for session in sessions if isinstance(session, dict)]
        # A file that was lost or damaged is no reason to lose the run.
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return []

    def holds_run(self) -> bool:
        """Return True if something was trained here."""
        return self.last.exists() or self.best.exists() or self.log_file.exists()

    def holds_results(self) -> bool:
        """Return True if something was trained here, or another network was evaluated into this directory."""
        return self.holds_run() or self.anytime.exists() or self.policy.exists()

    def refuse_second(self) -> None:
        """Raise a ``UserError`` if there is something that a new run would replace."""
        if self.holds_run():
            raise UserError(
                f"{self.path} holds a run; --resume continues it, --overwrite starts again, "
                "--save DIR goes elsewhere"
            )
        if self.holds_results():
            raise UserError(
                f"{self.path} holds the tables of an evaluation; --overwrite replaces them, "
                "--save DIR goes elsewhere"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of this directory until the block ends.

        The system releases the lock when the process dies.

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
        with self.lock_file.open("w") as stream:
            try:
                # lockf, not flock: a forked worker would inherit flock's lock, and outlives a killed run by
                # seconds.
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
            if [*self.path.iterdir()] == [self.lock_file]:
                self.lock_file.unlink()
                for folder in made:
                    folder.rmdir()
