"""Checkpoints that describe themselves: network configuration, data set, split, settings, and all a run needs to go on.

save_checkpoint(path, state)
state = load_checkpoint(path)
network = network_from(state)
"""

import dataclasses
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataloader import DataInfo
from models import IMTA, MSDNet
from utils import UserError, atomic_write

FORMAT = "imta-msdnet checkpoint 1"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain types only) atomically.

    Raises:
        UserError: the file cannot be written; an old one is then untouched.
    """
    with atomic_write(path, "wb") as stream:
        torch.save({"format": FORMAT, **state}, stream)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project, on the CPU.

    Raises:
        UserError: one line: the file is missing, truncated, needs unsafe unpickling, or is not a checkpoint of this project.
    """
    state = read_tensors(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project")
    missing = {"network", "state_dict", "data", "held_out", "settings"} - state.keys()
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}")
    return state


def read_tensors(path: Path) -> Any:
    """``torch.load`` of tensors and plain types only, with one-line errors.

    Raises:
        UserError: the file is missing, truncated, or needs more than tensors and plain types.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors and plain types, and is not loaded; "
            f"if you trust its source, load it there and save its state_dict alone"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read; it is truncated or no checkpoint ({type(error).__name__})") from None


def network_config(network: nn.Module) -> dict[str, Any]:
    """Plain description from which ``build_network`` makes the same network."""
    return {"type": type(network).__name__, **network.config}


def build_network(config: dict[str, Any]) -> MSDNet | IMTA:
    """The network that ``network_config`` described.

    Raises:
        UserError: the description is of no network of this project.
    """
    options = dict(config)
    kind = options.pop("type", None)
    try:
        if kind == "MSDNet":
            return MSDNet(**options)
        if kind == "IMTA":
            return IMTA(MSDNet(**options.pop("backbone")), **options)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"the checkpoint describes an impossible network: {error}") from None
    raise UserError(f"the checkpoint describes a network of unknown type {kind!r}")


def load_weights(network: nn.Module, state_dict: dict[str, torch.Tensor], source: Path) -> None:
    """Strict ``load_state_dict``.

    Raises:
        UserError: one line with the first tensor that does not fit.
    """
    expected = network.state_dict()
    for name in [*expected, *state_dict]:
        ours, theirs = (list(d[name].shape) if name in d else "nothing" for d in (expected, state_dict))
        if ours != theirs:
            raise UserError(f"{source} holds another network: {name} is {theirs} there, {ours} here")
    network.load_state_dict(state_dict)


def network_from(state: dict[str, Any], source: Path) -> MSDNet | IMTA:
    """The network of a checkpoint, with its weights, in evaluation mode.

    Raises:
        UserError: description and tensors do not fit.
    """
    network = build_network(state["network"])
    load_weights(network, state["state_dict"], source)
    return network.eval()


def data_info_from(state: dict[str, Any]) -> DataInfo:
    """What the checkpoint remembers of its data set."""
    return DataInfo(**state["data"])


def plain(value: Any) -> Any:
    """Settings as plain types: paths become strings, data classes dictionaries."""
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return str(value) if isinstance(value, Path) else value
