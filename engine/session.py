"""The run that a program trains or evaluates, and its record in ``run.json``.

Example:
    with recorded_in_run_json(session, command, resumed=False, frozen_digest=None): ...
"""

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

from engine.run_directory import RunDirectory
from engine.runtime.distributed import Processes
from engine.runtime.log import Log
from engine.runtime.signals import SignalRequests
from utils import UserError, atomic_write


@dataclass(frozen=True)
class Session:
    """One start or resumption of a run, for all its parts.

    Attributes:
        directory: The directory of the run.
        settings: The settings of the run; "auto" is resolved when the network is known, before it runs.
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
def recorded_in_run_json(
    session: Session, command: str, resumed: bool, frozen_digest: str | None
) -> Iterator[None]:
    """Record this session of a run in ``run.json``: how it was started, and how and when it ended.

    Args:
        session: The run.
        command: The command line.
        resumed: Whether the run continues, and its earlier sessions stay in the file.
        frozen_digest: Digest of the network that stage 2 keeps frozen.
    """
    path = session.directory.run_json
    record = {
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
        "sessions": [*(session.directory.sessions() if resumed else []), record],
    }
    _write(path, run)
    try:
        yield
        record["complete"] = True
    finally:
        record["ended"] = _now()
        # A full disk must not hide what went wrong before.
        with nullcontext() if record["complete"] else suppress(UserError):
            _write(path, run)


def to_plain_types(settings: Namespace) -> dict[str, Any]:
    """Return settings in plain types, as checkpoints and ``run.json`` keep them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}


def git_commit() -> str | None:
    """Return the commit of the code, with ``-dirty`` if it was changed since; None outside a git clone."""
    # Without the lock of the index, which a killed run would leave to the user.
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).resolve().parent.parent)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "*.py"], capture_output=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name}-dirty" if changed else name


def _write(path: Path, run: dict[str, Any]) -> None:
    with atomic_write(path) as stream:
        json.dump(run, stream, indent=1)
        stream.write("\n")


def _processor_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
