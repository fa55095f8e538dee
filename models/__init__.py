"""The networks and losses of the paper; see ``models.msdnet`` (GE), ``models.imta`` (ISC) and ``models.losses`` (OFA)."""

from models.imta import IMTA
from models.losses import one_for_all_loss, sum_of_cross_entropies
from models.msdnet import MSDNet
from models.operations import count_operations, measure_cost
from models.released import load_released, released_flags, to_released
from models.saved import Description, load
from models.stepwise import Stepwise

__all__ = [
    "IMTA",
    "Description",
    "MSDNet",
    "Stepwise",
    "count_operations",
    "load",
    "load_released",
    "measure_cost",
    "one_for_all_loss",
    "released_flags",
    "sum_of_cross_entropies",
    "to_released",
]
