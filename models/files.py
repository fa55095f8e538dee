"""Paths of the files of trained networks.

Example:
    find("imta_cifar100"), find("save/demo/IMTA"), find("elsewhere/network.safetensors")
"""

import os
from pathlib import Path

SUFFIX = ".safetensors"
BEST = f"best{SUFFIX}"  # in the directory of a run
WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


def find(path_or_name: str | os.PathLike) -> Path:
    """Return the file that a path, the directory of a run or the name of a shipped network means.

    Raises:
        OSError: There is none; the names are listed.
    """
    path = expand_home(path_or_name)
    name, runs = str(path), []
    if path.is_dir():
        runs = sorted(file.parent.name for file in path.glob(f"*/{BEST}"))
        path /= BEST
    if path.is_file():
        return path
    shipped = shipped_networks()
    if name in shipped:  # also beside a folder of that name, such as of an export
        return shipped[name]
    if runs:
        raise FileNotFoundError(f"there is no checkpoint {path}; its folder holds the runs {', '.join(runs)}")
    hint = ""
    if len(path.parts) == 1 and not path.suffix:
        hint = f", and no network of that name; there are: {', '.join(shipped) or 'none'}"
    raise FileNotFoundError(f"there is no checkpoint {path}{hint}")


def expand_home(path: str | os.PathLike) -> Path:
    """Return a path with a leading ``~`` or ``~user`` replaced, and as it is where there is no such home."""
    return Path(os.path.expanduser(path))  # noqa: PTH111, as Path.expanduser raises where there is none


def shipped_networks() -> dict[str, Path]:
    """Return the network files of ``weights/`` by their names."""
    return {file.stem: file for file in networks_in(WEIGHTS)}


def networks_in(folder: Path) -> list[Path]:
    """Return the network files of a folder, sorted, without their ``NAME.reference.safetensors``."""
    return [file for file in sorted(folder.glob(f"*{SUFFIX}")) if not Path(file.stem).suffix]


def is_network_file(path: Path) -> bool:
    """Return True if a file is, or should be, a safetensors file."""
    if path.suffix == SUFFIX or not path.is_file():
        return path.suffix == SUFFIX
    with path.open("rb") as stream:
        return stream.read(9)[8:] == b"{"
