"""Trained networks for ``torch.hub``: in evaluation mode, with a ``description``.

Example:
    network = torch.hub.load(REPOSITORY, "imta_cifar100")                         # from GitHub
    network = torch.hub.load("path/to/clone", "imta_cifar100", source="local")  # offline

The package ``models`` is imported as ``imta_msdnet``, because a program, or another repository of torch.hub,
may have its own ``models``.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

dependencies = ["torch", "safetensors"]
_NAME = "imta_msdnet"
_ROOT = Path(__file__).resolve().parent


def imta_cifar100() -> Any:
    """Return an IMTA network (GE + ISC + OFA) for CIFAR-100, 5 exits."""
    return _load("imta_cifar100")


def msdnet_cifar100() -> Any:
    """Return an MSDNet with GE for CIFAR-100, 5 exits."""
    return _load("msdnet_cifar100")


def msdnet_boosted_cifar100() -> Any:
    """Return an MSDNet with GE and boosted exits for CIFAR-100, 5 exits."""
    return _load("msdnet_boosted_cifar100")


def _load(name: str) -> Any:
    return _models().load(_ROOT / "weights" / f"{name}.safetensors")


def _models() -> ModuleType:
    """Import the package ``models`` beside this file under its private name."""
    folder = _ROOT / "models"
    loaded = sys.modules.get(_NAME)
    if loaded is not None and loaded.__path__ == [str(folder)]:
        return loaded
    for name in [name for name in sys.modules if name.split(".")[0] == _NAME]:
        del sys.modules[name]  # of another version of this repository
    spec = importlib.util.spec_from_file_location(
        _NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules[_NAME] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:  # such as Ctrl-C: the next call must not find half a module
        del sys.modules[_NAME]
        raise
    return module
