"""The networks and losses of the paper: ``MSDNet`` with Gradient Equilibrium, ``IMTA`` with ISC, One-for-all.

``Backbone`` puts exits with Gradient Equilibrium on any other network.

Reading order:

- the interface of all networks, and running one exit by exit: ``network``;
- the paper: ``layers``, ``options``, ``msdnet``, ``losses``, ``imta``;
- computing only what is read: ``lazy``; counting it: ``operations``;
- other networks: ``backbone``, ``backbone_exits``, ``cutting``, ``tracing``, ``equivalence``,
  ``third_party``;
- files: ``description``, ``saved``, ``released``, ``pytorch_files``, ``files``;
- for all: ``module_state``, ``normalizer``, ``errors``.
"""

from .backbone import Backbone, build_backbone
from .description import Description
from .imta import IMTA
from .losses import one_for_all_loss, sum_of_cross_entropies
from .msdnet import MSDNet
from .network import ExitNetwork, State, Stepwise
from .operations import count_operations, measure_cost
from .options import MSDNetOptions
from .released import load_released, to_released
from .saved import load, save

__all__ = [
    "IMTA",
    "Backbone",
    "Description",
    "ExitNetwork",
    "MSDNet",
    "MSDNetOptions",
    "State",
    "Stepwise",
    "build_backbone",
    "count_operations",
    "load",
    "load_released",
    "measure_cost",
    "one_for_all_loss",
    "save",
    "sum_of_cross_entropies",
    "to_released",
]
