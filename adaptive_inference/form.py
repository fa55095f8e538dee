"""The inference form of a network: BatchNorm folded into the convolutions and linear layers before it, channels-last, half precision.

    fast = inference_form(network)          # a copy; the same interface, operation counts and, to rounding, logits
    logits = fast(images.to(memory_format=torch.channels_last))

Folding is exact in real arithmetic: a convolution followed by a fixed affine map of each channel is a convolution with a bias.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from adaptive_inference.policies import PolicyCurve, network_fingerprint


def inference_form(network: nn.Module, channels_last: bool = True, dtype: torch.dtype | None = None) -> nn.Module:
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
        UserError: the curve is of another network, or of ONNX Runtime; ``source`` is named.
    """
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
    form = inference_form(network, dtype=dtypes.get(curve.form))
    curve.check(form, source)
    return form


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
