"""The files of a run: ``best.safetensors`` (``models.saved``) and ``last.pt``, from which the run resumes.

Example:
    saved = load_saved(path)
    save_checkpoint(path, checkpoint)
    checkpoint = load_checkpoint(path)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.runtime.device import is_out_of_memory
from models import ExitNetwork
from models.description import DataInfo, Description, Split
from models.files import find
from models.network import CannotBuildError
from models.pytorch_files import read_checkpoint
from models.saved import convert_command, network_bytes, read_network
from utils import UserError, atomic_write

FORMAT = "imta-msdnet run 3"


@dataclass(frozen=True)
class LoadedNetwork:
    """A network from a file, in evaluation mode, with its description and held-out split."""

    path: Path
    network: ExitNetwork
    description: Description
    split: Split

    @property
    def data(self) -> DataInfo:
        """Its data set."""
        return self.description.data

    @property
    def known_split(self) -> Split | None:
        """The split, None where the training images are unknown."""
        return self.split if self.data.knows_training_images else None


def load_saved(path: Path) -> LoadedNetwork:
    """Load the network of a run's directory, of a file or of a name in ``weights/``.

    Args:
        path: Directory of a run, file, or name in ``weights/``.

    Raises:
        UserError: One line: the file is missing, damaged, foreign or of another version.
    """
    try:
        path = find(path)
        network, description, split = read_network(path)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    return LoadedNetwork(path, network, description, split)


def save_network(
    path: Path, network: ExitNetwork, description: Description, split: Split, half: bool = False
) -> None:
    """Write a network's file atomically; for the arguments see ``models.saved.network_bytes``.

    Raises:
        UserError: The file cannot be written; an old one is kept.
    """
    with atomic_write(path, "wb") as stream:
        stream.write(network_bytes(network, description, split, half))


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write ``checkpoint`` (tensors and plain types only) atomically.

    Raises:
        UserError: The file cannot be written; an old one is kept.
    """
    try:
        with atomic_write(path, "wb") as stream:
            torch.save({**checkpoint, "format": FORMAT}, stream)
    except RuntimeError as error:
        # The archive writer fails once more while it closes after a full disk, and hides the first error.
        raise UserError(f"cannot write {path}: {error.__context__ or error}".splitlines()[0]) from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote, on the CPU, with ``description`` and ``split`` as such.

    Raises:
        UserError: One line: the file is missing, truncated, needs unsafe unpickling, or is of another
            version of the project.
    """
    try:
        checkpoint = read_checkpoint(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    if checkpoint.get("format") == "imta-msdnet run 2":
        raise UserError(
            f"{path} was written by an earlier version: an unfinished training is finished with the code it "
            "began with; "
            f"convert a finished run: {convert_command(path.parent)}"
        )
    if checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is not a run of this version of the project")
    with report_damage(path):
        if missing := {"state_dict", "launch", "epoch", "step", "best_epoch"} - checkpoint.keys():
            raise KeyError(*missing)
        split = Split.from_tensors(checkpoint)
        description = Description.from_dict(checkpoint["description"])
        return {**checkpoint, "description": description, "split": split}


@contextmanager
def report_damage(path: Path) -> Iterator[None]:
    """Turn errors in the block, which the content of the file at ``path`` causes, into a ``UserError``."""
    try:
        yield
    except CannotBuildError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None
