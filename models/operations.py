"""Operations and parameters up to every exit, counted as the published plots count them.

A convolution or linear layer costs its multiply-adds (and a linear layer one addition a bias), a ReLU one an element, a pooling
layer its kernel size times its outputs; batch normalisation is free, as it can be folded into the convolution before it.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.layers import Boost
from models.stepwise import Stepwise


class Cost(NamedTuple):
    """Cumulative cost to each exit, shallowest first."""

    operations: list[int]
    parameters: list[int]


def count_operations(network: nn.Module, image_size: int, lazy: bool = False) -> list[int]:
    """Operations for one image of ``image_size`` x ``image_size`` pixels up to every exit.

    Args:
        network: ``MSDNet`` or ``IMTA``. Only what an exit needs is counted: of a stage-2 network the ISC links and the new classifiers,
            and not the stage-1 classifiers.
        lazy: count as ``Stepwise`` computes, instead of whole blocks (the published way).

    Raises:
        ValueError: the image is too small for the network.
    """
    return measure_cost(network, image_size, lazy).operations


def measure_cost(network: nn.Module, image_size: int, lazy: bool = False) -> Cost:
    """As ``count_operations``, with the parameters used up to every exit."""
    if image_size < network.minimum_image_size:
        raise ValueError(
            f"an image of {image_size} pixels is too small: this network needs at least {network.minimum_image_size}"
        )
    # Shapes alone are needed: on the meta device nothing is computed.
    network = copy.deepcopy(network).to("meta").eval()
    operations = parameters = 0

    def add_cost(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal operations, parameters
        operations += _operations_of(module, inputs[0], output)
        parameters += sum(p.numel() for p in module.parameters())

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(add_cost)
    cost = Cost([], [])
    with torch.no_grad():
        run = Stepwise(network, torch.zeros(1, 3, image_size, image_size, device="meta"), lazy)
        for _ in range(network.num_exits):
            run.next_logits()
            cost.operations.append(operations)
            cost.parameters.append(parameters)
    return cost


def _operations_of(module: nn.Module, x: Tensor, output: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        return output.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return module.weight.numel() + module.bias.numel()
    if isinstance(module, nn.ReLU):
        return x.numel()
    if isinstance(module, nn.MaxPool2d):
        return output.numel() * module.kernel_size**2
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return x.numel()
    if isinstance(module, Boost):
        return output.numel()
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)):
        return 0
    raise TypeError(f"no operation count for a layer of type {type(module).__name__}")
