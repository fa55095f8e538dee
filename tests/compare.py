"""Checks that the files of a run are whole, and the same as those of another run to the last bit.

problems, leftovers = unreadable(path)
assert differences(path, undisturbed) == []
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError

from adaptive_inference import read_policy
from args import MAY_CHANGE_WHEN_RESUMING
from engine.checkpoint import load_checkpoint, load_saved
from engine.report import read_csv
from engine.run_directory import RunDirectory
from models import Description
from utils import UserError

# What a training says of itself differs from run to run: how fast it was, and what started it.
MEASURED = {"seconds", "images_per_second", "launch"}
TABLES, PICTURES = (
    ("anytime.csv", "budgeted.csv", "optimised.csv", "ensemble.csv"),
    ("curves.png", "examples.png"),
)


def unreadable(path: Path) -> tuple[list[str], int]:
    """Return what is damaged in the directory of a run, and how many temporary files lie there."""
    directory = RunDirectory(path)
    checks: dict[Path, Callable[[Path], object]] = {
        directory.last: load_checkpoint,
        directory.best: load_saved,
        directory.log_file: _read_log,
        directory.run_json: lambda p: json.loads(p.read_text()),
        directory.policy: read_policy,
        directory.reference: safetensors.torch.load_file,
        **dict.fromkeys((path / name for name in TABLES), _read_table),
        **dict.fromkeys((path / name for name in PICTURES), lambda p: Image.open(p).load()),
    }
    problems, leftovers = [], 0
    for file in sorted(path.iterdir()) if path.exists() else []:
        if file.suffix == ".tmp" and any(file.name.startswith(f".{known.name}.") for known in checks):
            leftovers += 1
        elif file in checks:
            try:
                checks[file](file)
            except (UserError, OSError, ValueError, SyntaxError, SafetensorError) as error:
                problems.append(f"{file.name} is damaged: {error}")
        elif file.name not in (".lock", "tensorboard"):
            problems.append(f"{file.name} does not belong there")
    return problems, leftovers


def _read_log(path: Path) -> list[dict]:
    text = path.read_text()
    if text and not text.endswith("\n"):
        raise ValueError("its last line is not whole")
    rows = [json.loads(line) for line in text.splitlines()]
    if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
        raise ValueError("epochs are missing")
    return rows


def _read_table(path: Path) -> None:
    rows = len(read_csv(path))
    if rows != (3 if path.name == "anytime.csv" else 40):
        raise ValueError(f"it has {rows} rows")


def differences(run_path: Path, wanted: Path) -> list[str]:
    """Return how a finished run differs from ``wanted``, apart from times and what resuming may change."""
    found = []
    for name, read in (("last.pt", _last), ("best.safetensors", _best)):
        ours, theirs = (read(path / name) for path in (run_path, wanted))
        found += [
            f"{name}: {key}"
            for key in ours.keys() | theirs.keys()
            if _exact(ours.get(key)) != _exact(theirs.get(key))
        ]
    ours, theirs = (
        [_without(row, MEASURED) for row in _read_log(path / "log.jsonl")] for path in (run_path, wanted)
    )
    found += [] if ours == theirs else ["log.jsonl"]
    for name in (*TABLES, "policy.json", *PICTURES):
        if not (run_path / name).exists() or (run_path / name).read_bytes() != (wanted / name).read_bytes():
            found.append(name)
    ours, theirs = (_reference(path / "reference.safetensors") for path in (run_path, wanted))
    found += [] if ours == theirs else ["reference.safetensors"]
    return found


def _reference(path: Path) -> dict[str, Any] | None:
    """Return what a reference file holds; None if held-out images are not known to be new to the network."""
    if not path.exists():
        return None
    with safetensors.safe_open(path, "pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        return {**content.metadata(), **{name: _exact(x) for name, x in tensors.items()}}


def _last(path: Path) -> dict[str, Any]:
    state = load_checkpoint(path)
    history = [_without(row, MEASURED) for row in state["history"]]
    return {**_without(state, MEASURED), "history": history, "description": _comparable(state["description"])}


def _best(path: Path) -> dict[str, Any]:
    saved = load_saved(path)
    return {
        "state_dict": saved.network.state_dict(),
        **saved.split.to_tensors(),
        "description": _comparable(saved.description),
    }


def _comparable(description: Description) -> dict[str, Any]:
    # Whoever commits meanwhile changes nothing of the run.
    return {
        **_without(dataclasses.asdict(description), {"commit"}),
        "recipe": _without(description.recipe, MAY_CHANGE_WHEN_RESUMING),
    }


def _without(row: dict, names: set[str]) -> dict:
    return {name: value for name, value in row.items() if name not in names}


def _exact(value: Any) -> str:
    """A text that is the same for what is equal to the last bit, and of the same type."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.contiguous().numpy()).hexdigest()}"
    if isinstance(value, dict):
        return str(sorted((repr(key), _exact(entry)) for key, entry in value.items()))
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} {[_exact(entry) for entry in value]}"
    return repr(value)
