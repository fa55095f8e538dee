"""A predictor by the name or file of a network, with the policies that lie beside it.

Example:
    predictor = load_predictor("imta_cifar100", operations=20e6)
    predictor(images).classes
    predictor.predict_images(["photo.jpg"]).classes
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_inference.fold import FoldedNetwork, fold
from adaptive_inference.points import Promise, choose
from adaptive_inference.policies import PolicyCurve
from adaptive_inference.policy_files import DTYPES, check_curve, policy_path, read_policy
from adaptive_inference.predictor import AdaptivePredictor
from models import ExitNetwork, load
from models.description import DataInfo
from models.files import find
from utils import UserError


def load_predictor(
    path_or_name: str | Path,
    dtype: torch.dtype | None = None,
    operations: float | None = None,
    accuracy: float | None = None,
    max_loss: Promise | None = None,
    rule: str | None = None,
    network: nn.Module | None = None,
) -> AdaptivePredictor:
    """Load a network with its classes, preprocessing and a policy, folded and ready to predict.

    Without operations, accuracy or max_loss, the policy nearest to half of the network is taken, as in
    predict.py. A budget in milliseconds needs times of the loaded network: see
    ``promises.deadlines.BudgetPredictor``.

    Args:
        path_or_name: File or name, as for ``models.load``; the policies lie beside the file.
        dtype: Dtype of the policies, in which the network predicts. If None, float32, or the dtype of the
            policies there are.
        operations: Largest mean of operations per image.
        accuracy: Smallest accuracy on held-out images, in percent.
        max_loss: A promise about accuracy, ``promises.risk.MaxLoss``.
        rule: Only policies found by this rule; see ``eligible_points``.
        network: The network without exits, for the file of a custom network, as for ``models.load``.

    Raises:
        OSError, ValueError: ``models.load`` refuses the file.
        UserError: There are no policies of this network or in this dtype, or none satisfies the request.
    """
    file = find(path_or_name)
    source = policy_path(file, _name_of(dtype or torch.float32))
    curve = read_policy(source)
    if dtype is not None and curve.dtype != _name_of(dtype):
        raise UserError(f"{source} is for {curve.dtype}, and there are no policies for {_name_of(dtype)}")
    if operations is accuracy is max_loss is None:
        point = curve.default_point(rule)
    else:
        point = choose(curve, operations=operations, accuracy=accuracy, max_loss=max_loss, rule=rule)
    return AdaptivePredictor(folded_for(load(file, network), curve, source), point.policy, _preprocess)


def folded_for(network: ExitNetwork, curve: PolicyCurve, source: Path) -> FoldedNetwork:
    """Return ``network`` folded, in the dtype that a policy curve was made for.

    Raises:
        UserError: The curve was made for another network; the line names ``source``.
    """
    folded = fold(network, dtype=getattr(torch, curve.dtype) if curve.dtype in DTYPES else None)
    check_curve(curve, folded, source)
    return folded


def _preprocess(image: Any, data: DataInfo) -> Tensor:
    from image_data.preprocessing import preprocess  # only image files need PIL and torchvision

    return preprocess(image, data)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
