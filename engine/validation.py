"""What a checkpoint may hold: a file from elsewhere, or a damaged one, must be refused before anything is done with it.

check_state(state)     # ValueError: "settings: lr is 'x'"
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from typing import Any, get_args, get_origin

import torch
from torch import Tensor

from args import build_parser
from datasets import DataInfo
from models import IMTA, MSDNet
from models.options import NETWORK_FIELDS
from settings import OPTIONS

DEEPEST = 8  # dictionaries and lists within each other
MOST_ENTRIES = 10**6
LONGEST_TEXT = 10_000
LARGEST_IMAGE = 10_000  # pixels, height and width


def check_state(state: dict[str, Any]) -> None:
    """Check every entry of a checkpoint on its own, and those that must agree with each other.

    Raises:
        ValueError: the first wrong entry, in one line.
    """
    visits = itertools.count()
    for name, value in state.items():
        _check_plain(str(name), value, DEEPEST, visits)
    for name, is_right in _ENTRIES.items():
        if name in state and not is_right(state[name]):
            raise ValueError(f"{name} is {_shown(state[name])}, of the wrong kind or content")
    _check_data(state["data"])
    _check_settings(state["settings"])
    _check_held_out(state["held_out"], state["data"]["num_training_images"])
    network = describe_network(state["network"])
    if network.num_classes != len(state["data"]["class_names"]):
        raise ValueError(f"its network has {network.num_classes} classes, its data {len(state['data']['class_names'])}")
    _check_weights(network, state["state_dict"])
    _check_progress(state, network)


def describe_network(config: dict[str, Any]) -> MSDNet | IMTA:
    """The network that a checkpoint describes, on the meta device: shapes without memory.

    Raises:
        ValueError: it describes none.
    """
    options = dict(config)
    kind = options.pop("type", None)
    if kind not in ("MSDNet", "IMTA"):
        raise ValueError(f"it describes a network of unknown type {_shown(kind)}")
    for name, value in (options.get("backbone") if kind == "IMTA" and isinstance(options.get("backbone"), dict) else options).items():
        if name in _OPTIONS and not _OPTIONS[name](value):
            raise ValueError(f"it describes a network with {name} {_shown(value)}")
    try:
        with torch.device("meta"):
            return MSDNet(**options) if kind == "MSDNet" else IMTA(MSDNet(**options.pop("backbone")), **options)
    # What PyTorch raises on absurd numbers depends on how absurd they are.
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError, ArithmeticError) as error:
        raise ValueError(f"it describes an impossible network: {str(error).splitlines()[0][:200]}") from None


def _check_plain(name: str, value: Any, depth: int, visits: Iterator[int]) -> None:
    # The same list may stand in many places: a small file can hold a walk without end.
    if depth == 0 or next(visits) > MOST_ENTRIES:
        raise ValueError(f"{name} is nested too deep or too wide")
    if isinstance(value, Tensor):
        # A tensor may repeat one number along a dimension of any claimed length.
        if value.layout != torch.strided or value.is_meta or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{name} claims the shape {tuple(value.shape)} but stores fewer numbers")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, (str, int)) or len(str(key)) > 200:
                raise ValueError(f"{name} has the key {_shown(key)}")
            _check_plain(f"{name}.{key}", inner, depth - 1, visits)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_plain(name, inner, depth - 1, visits)
    elif isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise ValueError(f"{name} is {_shown(value)}")
    elif not isinstance(value, (str, int, float, type(None))):
        raise ValueError(f"{name} is a {type(value).__name__}")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} {tuple(value.shape)}"
    text = ascii(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:50]}..., {len(text)} characters"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) and not any(map(_holds_tensor, row.values())) for row in value)


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and any(map(_holds_tensor, value)))


def _is_random_state(value: Any) -> bool:
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        return False
    return True


_OPTION_KINDS: dict[type, Callable[[Any], bool]] = {
    bool: lambda value: isinstance(value, bool),
    int: _is_count,
    float: _is_number,
    str: _is_text,
    tuple: lambda value: isinstance(value, list) and all(map(_is_count, value)),
}
_OPTIONS = {"num_classes": _is_count, **{name: _OPTION_KINDS[type(choice.default)] for name, choice in NETWORK_FIELDS.items()}}

_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "stage": lambda value: value in ("GE", "IMTA"),
    "title": _is_text,
    "network": _is_dict,
    "state_dict": _is_dict,
    "data": _is_dict,
    "held_out": lambda value: isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 1,
    "settings": _is_dict,
    "origin": lambda value: value is None or isinstance(value, str),
    "frozen_digest": lambda value: value is None or isinstance(value, str),
    "constant_names": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "epoch": _is_count,
    "step": _is_count,
    "best_accuracy": _is_number,
    "best_epoch": _is_count,
    "skipped_steps": _is_count,
    "seconds": lambda value: _is_number(value) and value >= 0,
    "history": _is_rows,
    "optimizer": lambda value: _is_optimizer(value),
    "scaler": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "random_state": _is_random_state,
    "totals": lambda value: isinstance(value, Tensor) and value.dtype == torch.float64 and value.dim() == 1,
}


def _is_optimizer(value: Any) -> bool:
    """State of SGD: numbers for a group of parameters, a momentum for each of them."""
    if not (isinstance(value, dict) and value.keys() == {"state", "param_groups"} and isinstance(value["state"], dict)):
        return False
    groups = value["param_groups"]
    if not (isinstance(groups, list) and len(groups) == 1 and isinstance(groups[0], dict)):
        return False
    group = dict(groups[0])
    parameters = group.pop("params", None)
    if not (isinstance(parameters, list) and all(map(_is_count, parameters)) and value["state"].keys() <= set(parameters)):
        return False
    numbers = [group.get(name) for name in ("lr", "momentum", "dampening", "weight_decay")]
    if not all(map(_is_number, numbers)) or not all(v is None or isinstance(v, bool) or _is_number(v) for v in group.values()):
        return False
    momenta = [entry.get("momentum_buffer", False) if isinstance(entry, dict) else False for entry in value["state"].values()]
    return all(x is None or isinstance(x, Tensor) for x in momenta)


def _check_data(data: dict[str, Any]) -> None:
    names = {field.name for field in fields(DataInfo)}
    if data.keys() != names:
        raise ValueError(f"data has {', '.join(sorted(map(str, data)))[:200]}, where {', '.join(sorted(names))} belong")
    for field in fields(DataInfo):
        value, kind = data[field.name], get_origin(field.type) or field.type
        inner = get_args(field.type)
        is_right = _is_count(value) if kind is int else isinstance(value, kind)
        if inner and is_right:
            is_right = all(map(_is_number, value)) if inner[0] is float else all(isinstance(x, inner[0]) for x in value)
        if not is_right:
            raise ValueError(f"data.{field.name} is {_shown(value)}")
    if not 1 <= data["image_size"] <= LARGEST_IMAGE:
        raise ValueError(f"data.image_size is {_shown(data['image_size'])}")
    if len(data["mean"]) != 3 or len(data["std"]) != 3 or min(data["std"]) <= 0:
        raise ValueError("data.mean and data.std must be three numbers each, the latter above 0")


@cache
def _flags() -> dict[str, argparse.Action]:
    # Stage 2 has every flag that stage 1 has.
    return {action.dest: action for action in build_parser("IMTA")._actions if action.dest != "help"}


def _check_settings(settings: dict[str, Any]) -> None:
    """Settings are held to the rules of their flags."""
    if "data" not in settings:
        raise ValueError("settings lack data")
    for name, value in settings.items():
        if value is None and name in OPTIONS and OPTIONS[name].default is None:
            continue
        action = _flags().get(name)
        if action is not None and not _is_allowed(action, value):
            raise ValueError(f"settings.{name} is {_shown(value)}")


def _is_allowed(action: argparse.Action, value: Any) -> bool:
    if action.nargs == 0:
        return isinstance(value, bool)
    if isinstance(value, (list, tuple)):
        texts = [separator.join(map(str, value)) for separator in ("-", ",")]
    else:
        texts = [str(value)] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else []
    if action.choices is not None:
        return value in action.choices
    return any(_converts(action.type, text, value) for text in texts)


def _converts(kind: Callable, text: str, value: Any) -> bool:
    try:
        converted = kind(text)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return isinstance(value, str) if not isinstance(converted, (int, float, tuple)) else not isinstance(value, str)


def _check_held_out(held_out: Tensor, num_images: int) -> None:
    if len(held_out) and not (held_out[0] >= 0 and held_out[-1] < num_images and bool((held_out.diff() > 0).all())):
        raise ValueError(f"held_out are not sorted numbers of {num_images} training images")


def first_mismatch(expected: dict[str, Tensor], given: dict[str, Tensor]) -> tuple[str, Any, Any] | None:
    """Name of the first tensor that is of another shape in ``given``, or in one of the two only, and both shapes; None if all fit."""
    for name in [*expected, *given]:
        shapes = [list(tensors[name].shape) if name in tensors else "nothing" for tensors in (expected, given)]
        if shapes[0] != shapes[1]:
            return name, *shapes
    return None


def _check_weights(network: MSDNet | IMTA, state_dict: dict[str, Tensor]) -> None:
    expected = network.state_dict()
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is {_shown(value)}, where a tensor belongs")
    if mismatch := first_mismatch(expected, state_dict):
        raise ValueError("it describes a network with {} {}, and holds {}".format(*mismatch))
    for name in expected:
        if state_dict[name].dtype != expected[name].dtype:
            raise ValueError(f"{name} is {state_dict[name].dtype}, where {expected[name].dtype} belongs")


def _check_progress(state: dict[str, Any], network: MSDNet | IMTA) -> None:
    settings = {**{name: choice.default for name, choice in OPTIONS.items()}, **state["settings"]}
    epoch, best_epoch, step, epochs = state.get("epoch", 0), state.get("best_epoch", 0), state.get("step", 0), settings["epochs"]
    if not best_epoch <= epoch <= epochs:
        raise ValueError(f"epoch {_shown(epoch)} of {_shown(epochs)} is done, {_shown(best_epoch)} was the best")
    if step * settings["batch_size"] > state["data"]["num_training_images"]:
        raise ValueError(f"step {_shown(step)} is beyond the end of an epoch")
    if len(state.get("history", [])) != epoch:
        raise ValueError(f"history has {len(state.get('history', []))} rows for {_shown(epoch)} epochs")
    if "constant_names" in state and not set(state["constant_names"]) <= state.keys():
        raise ValueError("constant_names names what is not there")
    if "totals" in state and len(state["totals"]) != 2 + network.num_exits:
        raise ValueError(f"totals is {_shown(state['totals'])}")
