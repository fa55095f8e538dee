"""The files of a run: ``best.safetensors`` (``models.saved``), and ``last.pt``, from which the run itself goes on.

saved = load_saved(path, {})       # of this project, or of a released program
save_checkpoint(path, state)
state = load_checkpoint(path)
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from args import as_typed
from image_data.sources import DataInfo
from models import IMTA, MSDNet, load_released
from models.files import find
from models.released import PUBLISHED_NAMES, read_checkpoint
from models.saved import Description, Split, is_network_file, read_network
from settings import FLAGS, OPTIONS
from utils import UserError, atomic_write

FORMAT = "imta-msdnet run 2"


@dataclass(frozen=True)
class Saved:
    """A network from a file, in evaluation mode. Of a released one only the network is known."""

    path: Path
    network: MSDNet | IMTA
    description: Description | None = None
    split: Split | None = None

    @property
    def settings(self) -> dict[str, Any] | None:
        """Settings of the run that wrote it."""
        return (
            {**settings_of(self.description), "image_size": self.description.image_size}
            if self.description
            else None
        )

    @property
    def data(self) -> DataInfo | None:
        """What it remembers of its data set."""
        return data_info_of(self.description) if self.description else None


def load_saved(path: Path, explicit: dict[str, Any]) -> Saved:
    """The network of a run's directory, of a file or name (``models.load``) of this project, or of a released program's checkpoint.

    Args:
        explicit: what the command line says. Network options must agree with the file; where a released file leaves them open, they
            decide.

    Raises:
        UserError: one line: the file is missing, damaged or foreign, or what disagrees.
    """
    try:
        path = find(path)
        if is_network_file(path):
            network, description, split = read_network(path)
        else:
            flags = {flag: explicit[name] for flag, name in PUBLISHED_NAMES.items() if name in explicit}
            network = load_released(path, gradient_equilibrium=explicit.get("gradient_equilibrium"), **flags)
            description = split = None
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    config = {**network.config.get("backbone", {}), **network.config}
    for name, value in explicit.items():
        if name in config and config[name] != (list(value) if isinstance(value, tuple) else value):
            raise UserError(f"{path} has {FLAGS[name]} {config[name]}, the command line says {value}")
    return Saved(path, network, description, split)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain types only) atomically; an old file stays until the new one was read back without fault.

    Raises:
        UserError: the file cannot be written; an old one is then untouched.
    """
    try:
        with atomic_write(path, "wb", _check_archive) as stream:
            torch.save({"format": FORMAT, **state}, stream)
    except RuntimeError as error:
        # The archive writer fails once more while it closes after a full disk, and hides the first error.
        raise UserError(f"cannot write {path}: {error.__context__ or error}".splitlines()[0]) from None


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise OSError(f"what was written reads back differently ({damaged})")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What ``save_checkpoint`` wrote, on the CPU, with ``description`` and ``split`` as such.

    Raises:
        UserError: one line: the file is missing, truncated, needs unsafe unpickling, or is none of this version of the project.
    """
    try:
        state = read_checkpoint(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    if state.get("format") != FORMAT:
        raise UserError(f"{path} is no run of this version of the project to go on from")
    with damage_named(path):
        if missing := {"state_dict", "launch", "epoch", "step", "best_epoch"} - state.keys():
            raise KeyError(*missing)
        split = Split(state["held_out"], state["names"])
        return {**state, "description": Description(**state["description"]), "split": split}


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Within the block, what the content of the file at ``path`` makes fail is a ``UserError`` that names it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None


def settings_of(description: Description) -> dict[str, Any]:
    """The settings a run had, in the types that the command line gives them.

    Raises:
        UserError: one that its flag would refuse.
    """
    return {name: as_typed(name, value) for name, value in description.recipe.items() if name in OPTIONS}


def data_info_of(description: Description) -> DataInfo:
    """What a run remembers of its data set."""
    preprocessing = {
        name: getattr(description, name) for name in ("class_names", "image_size", "mean", "std")
    }
    return DataInfo(**description.data, **preprocessing)
