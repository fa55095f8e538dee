"""Stage 1: train an MSDNet with Gradient Equilibrium, then evaluate every exit and budgeted prediction.

    python train_GE.py                                                  # the synthetic demo
    python train_GE.py --preset cifar100 --data-root data --save save/cifar100/GE
    python train_GE.py --preset cifar100 --evalmode anytime
    python train_GE.py --pretrained imta_cifar100 --data-root photos    # fine-tuning

Gradient Equilibrium is ``ExitNetwork.rescale`` (``models.network``), called in ``MSDNet.features`` and
``Backbone.features``; this file has the loss, the sum of the exits' cross-entropies.
"""

import os

# OpenMP's threads spin while they wait for each other, which makes everything many times slower beside a busy
# program. This has to be set before PyTorch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from argparse import Namespace

import torch
from torch import Tensor, nn

from args import STAGES
from engine.checkpoint import LoadedNetwork
from engine.networks import new_network, stage_1_network_from
from engine.run import end_program, run
from engine.stage import Stage
from models import ExitNetwork, sum_of_cross_entropies
from models.description import DataInfo
from settings.command_line import parse
from utils import UserError


class Stage1Objective(nn.Module):
    """The objective of stage 1: images and targets -> losses (N,) and the logits of all exits (N, K, C)."""

    def __init__(self, network: ExitNetwork, settings: Namespace):
        super().__init__()
        self.network, self.label_smoothing = network, settings.label_smoothing

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute losses and logits of images (N, 3, H, W) with targets (N,)."""
        logits = self.network(images)
        return sum_of_cross_entropies(logits, targets, self.label_smoothing), torch.stack(logits, dim=1)


class Stage1(Stage):
    """The training of a whole network, from scratch or from the weights of another."""

    spec = STAGES["GE"]
    next_command = "train_IMTA.py --pretrained"

    def make_network(self, settings: Namespace, data: DataInfo, origin: LoadedNetwork | None) -> ExitNetwork:
        """Build the network that the flags describe, or that of ``origin`` with its weights.

        Weights of classifiers are taken over only where the classes are the same.

        Raises:
            UserError: The combination of options is impossible.
        """
        network = stage_1_network_from(origin, data) if origin else new_network(settings, data)
        if settings.freeze == "backbone":
            try:
                network.freeze_pretrained()
            except ValueError as error:
                raise UserError(f"--freeze backbone: {error}") from None
        return network

    def make_objective(self, network: ExitNetwork, settings: Namespace) -> Stage1Objective:
        """Build the sum of the exits' losses."""
        return Stage1Objective(network, settings)

    def title(self, network: ExitNetwork, settings: Namespace) -> str:
        """Return the title of a run's curves."""
        parts = [network.title]
        if network.gradient_equilibrium:
            parts.append("GE")
        if network.boosted:
            parts.append("boosted exits")
        return " + ".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Run stage 1 with these arguments (those of the process if None) and return the exit status."""
    stage = Stage1()
    return run(parse(stage.name, argv), stage)


if __name__ == "__main__":
    end_program(main())
