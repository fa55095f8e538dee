"""The inference form of a network: BatchNorm folded into the convolutions and linear layers before it, channels-last, half precision.

    fast = inference_form(network)          # a copy; the same interface, operation counts and, to rounding, logits
    logits = fast(images.to(memory_format=torch.channels_last))
    predictor = load_predictor("imta_cifar100", operations=20e6)

Folding is exact in real arithmetic: a convolution followed by a fixed affine map of each channel is a convolution with a bias.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from adaptive_inference.policies import PolicyCurve, choose, network_fingerprint, read_policy
from adaptive_inference.predictor import AdaptivePredictor
from models import load
from models.files import find, policy_path


def inference_form(
    network: nn.Module, channels_last: bool = True, dtype: torch.dtype | None = None
) -> nn.Module:
    """A copy of ``network`` for prediction alone.

    Args:
        network: ``MSDNet`` or ``IMTA``; it is not changed.
        channels_last: weights in the memory layout in which convolutions are faster on most devices.
        dtype: type of weights and activations, such as ``half_precision(device)``; None keeps the network's.

    Returns:
        A network of the same class in evaluation mode. It casts images to its type and layout itself, keeps the fingerprint of the
        original (``policies.network_fingerprint``), and cannot be trained or saved as a checkpoint.
    """
    form = copy.deepcopy(network).eval().requires_grad_(False)
    form.fingerprint = network_fingerprint(network)
    trunk = form.trunk
    trunk.gradient_equilibrium = False  # the identity in prediction, and a function call a scale
    for module in form.modules():
        if isinstance(module, nn.Sequential):
            _fold(module)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    form.to(dtype=dtype, memory_format=layout)
    stem = trunk.stem
    wanted_dtype = next(stem.parameters()).dtype

    def prepare(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].to(dtype=wanted_dtype, memory_format=layout),)

    stem.register_forward_pre_hook(prepare)
    return form


def form_for(network: nn.Module, curve: PolicyCurve, source: Path) -> nn.Module:
    """The inference form of ``network`` that a policy curve was made for.

    Raises:
        UserError: the curve is of another network; ``source`` is named.
    """
    dtypes = {
        str(dtype).removeprefix("torch."): dtype
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    }
    form = inference_form(network, dtype=dtypes.get(curve.form))
    curve.check(form, source)
    return form


def load_predictor(path_or_name: str | Path, **limits: Any) -> AdaptivePredictor:
    """A predictor that is ready to answer: a network with its classes and preprocessing, in its fastest form, and a policy.

    Args:
        path_or_name: as for ``models.load``; the policies lie beside it.
        limits: as for ``choose``, such as ``operations``; without any the policy nearest to half of the network, as in predict.py.

    Raises:
        OSError, ValueError: as ``models.load``.
        UserError: there are no policies of this network, or none grants the limits.
    """
    file = find(path_or_name)
    source = policy_path(file)
    curve = read_policy(source)
    point = choose(curve, **limits) if limits else curve.nearest(curve.operations[-1] / 2)
    return AdaptivePredictor(form_for(load(file), curve, source), point.policy)


def _fold(sequence: nn.Sequential) -> None:
    layers: list[nn.Module] = []
    for module in sequence:
        if isinstance(module, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], module)
        elif isinstance(module, nn.BatchNorm1d):
            layers[-1] = fuse_linear_bn_eval(layers[-1], module)
        else:
            layers.append(module)
    sequence._modules.clear()
    sequence.extend(layers)
