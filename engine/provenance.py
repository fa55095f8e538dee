"""``run.json``: the commands, settings, hardware and software versions a run was made with, one piece for every start or resumption."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from engine.session import Session
from settings import plain
from utils import UserError, atomic_write


@contextmanager
def recorded(session: Session, command: str, resumed: bool, frozen_digest: str | None) -> Iterator[None]:
    """Record a piece of a run: how it was started, when it ended, and whether the run was then complete.

    Args:
        command: the command line of this piece.
        resumed: whether the run goes on, and the pieces that are in the file stay.
        frozen_digest: of the network that stage 2 keeps frozen.
    """
    path = session.run.record
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
        "commit": commit(),
    }
    run = {
        "settings": plain(session.settings),
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


def _write(path: Path, run: dict[str, Any]) -> None:
    with atomic_write(path) as stream:
        json.dump(run, stream, indent=1)
        stream.write("\n")


def commit() -> str | None:
    """Of the code, with ``-dirty`` if it was changed since; None outside a git clone."""
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


def _pieces(path: Path) -> list[dict[str, Any]]:
    # A record that was lost or damaged is no reason to lose the run.
    try:
        return [
            piece
            for piece in json.loads(path.read_text(encoding="utf-8"))["pieces"]
            if isinstance(piece, dict)
        ]
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
