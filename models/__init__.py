"""The networks and losses of the paper; see ``models.msdnet`` (GE), ``models.imta`` (ISC) and ``models.losses`` (OFA).

Names are imported when they are first used, so that ``models.options`` alone does not load PyTorch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "Description": "saved",
    "IMTA": "imta",
    "MSDNet": "msdnet",
    "NetworkOptions": "options",
    "Stepwise": "stepwise",
    "count_operations": "operations",
    "load": "saved",
    "load_released": "released",
    "measure_cost": "operations",
    "one_for_all_loss": "losses",
    "sum_of_cross_entropies": "losses",
    "to_released": "released",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
