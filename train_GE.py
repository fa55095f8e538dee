"""Stage 1: train an MSDNet with Gradient Equilibrium, then evaluate every exit and budgeted prediction.

    python train_GE.py                                                  # the embedded demo
    python train_GE.py --preset cifar100 --data-root data --save save/cifar100/GE
    python train_GE.py --preset cifar100 --evalmode anytime

Gradient Equilibrium itself is in ``models.msdnet``; here is the loss, the sum of the exits' cross-entropies.
"""

import argparse
import inspect
import sys

import torch
from torch import Tensor, nn

from args import CommandLine
from datasets import DataInfo
from engine.checkpoint import Saved
from engine.stage import Stage, run_stage
from models import MSDNet, sum_of_cross_entropies
from utils import UserError


class JointTraining(nn.Module):
    """Images and targets -> losses (N,) and the logits of all exits (N, K, C)."""

    def __init__(self, network: MSDNet, settings: argparse.Namespace):
        super().__init__()
        self.network, self.label_smoothing = network, settings.label_smoothing

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(images)
        return sum_of_cross_entropies(logits, targets, self.label_smoothing), torch.stack(logits, dim=1)


def make_msdnet(settings: argparse.Namespace, data: DataInfo, origin: Saved | None = None) -> MSDNet:
    """The network the flags describe.

    Raises:
        UserError: an impossible combination of options.
    """
    names = inspect.signature(MSDNet).parameters.keys() - {"num_classes", "small_inputs"}
    options = {name: getattr(settings, name) for name in names}
    small_inputs = data.image_size <= 64 if settings.small_inputs is None else settings.small_inputs
    try:
        return MSDNet(num_classes=len(data.class_names), small_inputs=small_inputs, **options)
    except ValueError as error:
        raise UserError(f"impossible network: {error}") from None


def title(settings: argparse.Namespace) -> str:
    """Name of this run in a plot."""
    return "MSDNet + GE" if settings.gradient_equilibrium else "MSDNet"


def no_origin(command: CommandLine) -> None:
    """Stage 1 starts from scratch."""


STAGE = Stage(
    name="GE",
    find_origin=no_origin,
    make_network=make_msdnet,
    make_objective=JointTraining,
    constants=lambda network: {},
    check_result=lambda network, constants: None,
    title=title,
    trains_backbone=lambda settings: True,
)


def main(argv: list[str] | None = None) -> int:
    """Run stage 1 with these arguments (None: those of the process) and return the exit status."""
    return run_stage(STAGE, argv)


if __name__ == "__main__":
    sys.exit(main())
