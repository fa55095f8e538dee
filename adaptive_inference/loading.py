"""A predictor by the name or file of a network, with the policies that lie beside it.

Example:
    predictor = load_predictor("imta_cifar100", operations=20e6)
    predictor(images).classes
"""

from pathlib import Path
from typing import Any

import torch

from adaptive_inference.choosing import choose
from adaptive_inference.fold import folded_for
from adaptive_inference.policy_files import policy_path, read_policy
from adaptive_inference.predictor import AdaptivePredictor
from models import load
from models.files import find


def load_predictor(
    path_or_name: str | Path, dtype: torch.dtype = torch.float32, **limits: Any
) -> AdaptivePredictor:
    """Load a network with its classes, preprocessing and a policy, folded and ready to predict.

    Args:
        path_or_name: File or name, as for ``models.load``; the policies lie beside the file.
        dtype: Dtype of the policies, where there are several files; with one file, its dtype is taken.
        limits: Arguments of ``choose``, such as ``operations``. Without any, the policy nearest to half of
            the network is taken, as in predict.py.

    Raises:
        OSError, ValueError: As ``models.load``.
        UserError: There are no policies of this network, or none grants the limits.
    """
    file = find(path_or_name)
    source = policy_path(file, str(dtype).removeprefix("torch."))
    curve = read_policy(source)
    point = choose(curve, **limits) if limits else curve.nearest(curve.operations[-1] / 2)
    return AdaptivePredictor(folded_for(load(file), curve, source), point.policy)
