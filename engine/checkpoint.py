"""Checkpoints that describe themselves: network configuration, data set, split, settings, and all a run needs to go on.

save_checkpoint(path, state)
state = load_checkpoint(path)
network = build_network(state["network"])
"""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets import DataInfo
from engine.validation import check_state, describe_network, first_mismatch
from models import IMTA, MSDNet, load_released
from models.released import PUBLISHED_NAMES
from settings import FLAGS
from utils import UserError, atomic_write

FORMAT = "imta-msdnet checkpoint 1"


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


@dataclass(frozen=True)
class Saved:
    """A network from a file, in evaluation mode. Of a released one only the network is known; its ``state`` is empty."""

    path: Path
    network: MSDNet | IMTA
    state: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any] | None:
        """Settings of the run that wrote it."""
        return self.state.get("settings")

    @property
    def data(self) -> DataInfo | None:
        """What it remembers of its data set."""
        return data_info_from(self.state) if self.state else None

    @property
    def held_out(self) -> Tensor | None:
        """Indices of the held-out training images."""
        return self.state.get("held_out")

    @property
    def names(self) -> Tensor | None:
        """Digests of the names of all training images."""
        return self.state.get("names")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project, on the CPU.

    Raises:
        UserError: one line: the file is missing, truncated, needs unsafe unpickling, or is not a checkpoint of this project.
    """
    return _checked(read_tensors(path), path)


def load_saved(path: Path, explicit: dict[str, Any]) -> Saved:
    """The network of a checkpoint of this project or of a released program.

    Args:
        explicit: what the command line says. Network options must agree with the file; where a released file leaves them open, they
            decide.

    Raises:
        UserError: one line: as ``load_checkpoint``, or what disagrees.
    """
    content = read_tensors(path)
    if not (isinstance(content, dict) and "format" in content):
        return Saved(path, _released_network(content, path, explicit), {})
    state = _checked(content, path)
    network = build_network(state["network"])
    load_weights(network, state["state_dict"], path)
    config = {**network.config["backbone"], **network.config} if isinstance(network, IMTA) else network.config
    for name, value in explicit.items():
        if name in config and config[name] != (list(value) if isinstance(value, tuple) else value):
            raise UserError(f"{path} has {FLAGS[name]} {config[name]}, the command line says {value}")
    return Saved(path, network.eval(), state)


def _released_network(content: Any, path: Path, explicit: dict[str, Any]) -> MSDNet | IMTA:
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    flags = {flag: explicit[name] for flag, name in PUBLISHED_NAMES.items() if name in explicit}
    try:
        network = load_released(content, gradient_equilibrium=explicit.get("gradient_equilibrium"), **flags)
    except ValueError as error:
        raise UserError(f"{path}: {str(error).removeprefix('the given checkpoint: ')}") from None
    trunk = network.backbone if isinstance(network, IMTA) else network
    if explicit.get("small_inputs", trunk.small_inputs) != trunk.small_inputs:
        raise UserError(f"{path} has {'small' if trunk.small_inputs else 'large'} inputs, the command line says otherwise")
    return network


def _checked(state: Any, path: Path) -> dict[str, Any]:
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project")
    missing = {"stage", "title", "network", "state_dict", "data", "held_out", "settings", "origin"} - state.keys()
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}")
    try:
        check_state(state)
    except ValueError as error:
        raise UserError(f"{path} is damaged, or no checkpoint of this project: {_printable(str(error))}") from None
    return state


def _printable(text: str) -> str:
    """What comes from a file must not steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def read_tensors(path: Path) -> Any:
    """``torch.load`` of tensors and plain types only, with one-line errors.

    Raises:
        UserError: the file is missing, truncated, or needs more than tensors and plain types.
    """
    try:
        # PyTorch does not compare the archive's checksums: flipped bits would become weights.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # PyTorch compresses nothing: what is packed small would unpack into more memory than its file tells.
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise UserError(f"{path} is no checkpoint: its archive is compressed")
                damaged = archive.testzip()
            if damaged is not None:
                raise UserError(f"{path} is damaged: the checksum of {_printable(damaged)} is another")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise UserError(f"{path} is no checkpoint") from None
        raise UserError(
            f"{path} holds more than tensors and plain types, and is not loaded; "
            f"if you trust its source, load it there and save its state_dict alone"
        ) from None
    except UserError:
        raise
    except Exception as error:  # what the readers raise on damaged bytes depends on where the damage is
        raise UserError(f"{path} cannot be read; it is truncated or no checkpoint ({type(error).__name__})") from None


def network_config(network: nn.Module) -> dict[str, Any]:
    """Plain description from which ``build_network`` makes the same network."""
    return {"type": type(network).__name__, **network.config}


def build_network(config: dict[str, Any]) -> MSDNet | IMTA:
    """The network that ``network_config`` described.

    Raises:
        UserError: the description is of no network of this project.
    """
    try:
        describe_network(config)
    except ValueError as error:
        raise UserError(f"the checkpoint is damaged: {error}") from None
    options = {name: value for name, value in config.items() if name != "type"}
    if config["type"] == "MSDNet":
        return MSDNet(**options)
    return IMTA(MSDNet(**options.pop("backbone")), **options)


def load_weights(network: nn.Module, state_dict: dict[str, torch.Tensor], source: Path) -> None:
    """Strict ``load_state_dict``.

    Raises:
        UserError: one line with the first tensor that does not fit.
    """
    if mismatch := first_mismatch(network.state_dict(), state_dict):
        name, ours, theirs = mismatch
        raise UserError(f"{source} holds another network: {name} is {theirs} there, {ours} here")
    network.load_state_dict(state_dict)


def data_info_from(state: dict[str, Any]) -> DataInfo:
    """What the checkpoint remembers of its data set."""
    return DataInfo(**state["data"])
