"""The directory of a run: what lies where, and that only one process at a time writes there."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from models.files import BEST
from utils import UserError, complain


class RunDirectory:
    """Names of the files of a run."""

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
        self.examples = path / "examples.png"
        self.curves = path / "curves.png"
        self.tensorboard = path / "tensorboard"

    @property
    def results(self) -> list[Path]:
        """Everything a run writes but its events."""
        return [value for name, value in vars(self).items() if name not in ("path", "tensorboard")]

    def holds_run(self) -> bool:
        """Whether something was trained here."""
        return self.last.exists() or self.best.exists() or self.log.exists()

    def refuse_second(self) -> None:
        """Raise a ``UserError`` if something was trained here."""
        if self.holds_run():
            raise UserError(
                f"{self.path} holds a run; --resume goes on with it, --overwrite starts anew, --save DIR goes elsewhere"
            )

    def _clear_leftovers(self) -> None:
        """Remove what a killed run was writing."""
        for path in self.results:
            for leftover in self.path.glob(f".{path.name}.*.tmp"):
                leftover.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of this directory until the block ends; the system frees the lock of a killed process.

        Raises:
            UserError, OSError: another run writes here, or the directory cannot be made. Where locking is impossible, a line says so.
        """
        try:
            str(self.path).encode()  # TensorBoard writes into no other folders
        except UnicodeEncodeError:
            raise UserError(f"cannot write into --save {str(self.path)!a}: its name is no text") from None
        missing, owner = (
            [folder for folder in (self.path, *self.path.parents) if not folder.exists()],
            os.getpid(),
        )
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as stream:
            try:
                # Of this process alone: one that loads images outlives a killed run by seconds, and would keep what flock locks.
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(
                    f"another run is writing into {self.path}; choose another --save or wait for it"
                ) from None
            except OSError as error:
                complain(
                    f"the file system of --save {self.path} has no locks ({error.strerror}): see to it that no other run writes there"
                )
            self._clear_leftovers()
            try:
                yield
            finally:
                made_here = missing and os.getpid() == owner  # not in a forked copy
                with suppress(
                    OSError
                ):  # another run has come into one of the folders above, or they have gone
                    if made_here and [path.name for path in self.path.iterdir()] == [
                        ".lock"
                    ]:  # a refused run leaves nothing behind
                        (self.path / ".lock").unlink()
                        for folder in missing:
                            folder.rmdir()
