"""``run.json``: the commands, settings, hardware and software versions a run was made with, one piece for every start or resumption."""

import argparse
import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from engine.checkpoint import plain
from engine.distributed import Processes
from utils import atomic_write


class Provenance:
    """The record of a run; only the main process should have one.

    Args:
        path: the file.
        command: the command line of this piece.
        resumed: whether the run goes on, and the pieces that are in the file stay.
    """

    def __init__(self, path: Path, command: str, settings: argparse.Namespace, processes: Processes, resumed: bool):
        self.path = path
        self.settings = {name: plain(value) for name, value in vars(settings).items()}
        self.pieces = _pieces(path) if resumed else []
        self.pieces.append({"command": command, "began": _now(), "ended": None, **hardware(processes), **versions()})
        self._write()

    def end(self) -> None:
        """Note that the work is done."""
        self.pieces[-1]["ended"] = _now()
        self._write()

    def _write(self) -> None:
        with atomic_write(self.path) as stream:
            json.dump({"settings": self.settings, "pieces": self.pieces}, stream, indent=1)
            stream.write("\n")


def hardware(processes: Processes) -> dict[str, Any]:
    """What the run computes on: processor, cores, threads of this process, GPUs, processes."""
    gpus = [torch.cuda.get_device_name(i) for i in processes.gpu_ids]
    return {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "processes": processes.world_size,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute."""
    libraries = {"torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__}
    return {"python": platform.python_version(), **libraries, "system": f"{platform.system()} {platform.machine()}"}


def _pieces(path: Path) -> list[dict[str, Any]]:
    # A record that was lost or damaged is no reason to lose the run.
    try:
        return [piece for piece in json.loads(path.read_text(encoding="utf-8"))["pieces"] if isinstance(piece, dict)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
