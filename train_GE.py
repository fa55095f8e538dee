"""Stage 1: train an MSDNet with Gradient Equilibrium, then evaluate every exit and budgeted prediction.

    python train_GE.py                                                  # the embedded demo
    python train_GE.py --preset cifar100 --data-root data --save save/cifar100/GE
    python train_GE.py --preset cifar100 --evalmode anytime
    python train_GE.py --pretrained imta_cifar100 --data-root photos    # fine-tuning

Gradient Equilibrium itself is in ``models.msdnet``; here is the loss, the sum of the exits' cross-entropies.
"""

import os

# OpenMP's threads spin while they wait for each other, which makes everything many times slower beside a busy program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before PyTorch loads OpenMP

import sys
from argparse import Namespace

import torch
from torch import Tensor, nn

from args import NETWORK_OPTIONS, parse
from engine.checkpoint import Saved
from engine.run import Stage, run
from models import IMTA, ExitNetwork, MSDNet, sum_of_cross_entropies
from models.saved import DataInfo
from utils import UserError


class JointTraining(nn.Module):
    """The loss of stage 1: images and targets -> losses (N,) and the logits of all exits (N, K, C)."""

    def __init__(self, network: ExitNetwork, settings: Namespace):
        super().__init__()
        self.network, self.label_smoothing = network, settings.label_smoothing

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(images)
        return sum_of_cross_entropies(logits, targets, self.label_smoothing), torch.stack(logits, dim=1)


class Stage1(Stage):
    """The training of a whole network, from scratch or from the weights of another."""

    name = "GE"
    may_change_data = True
    next_command = "train_IMTA.py --pretrained"

    def make_network(self, settings: Namespace, data: DataInfo, origin: Saved | None) -> ExitNetwork:
        """Build the network the flags describe; with an ``origin`` its weights, those of classifiers only where the classes are the same.

        Raises:
            UserError: The combination of options is impossible.
        """
        if origin is not None:
            return _started_from(origin, data)
        options = {name: getattr(settings, name) for name in NETWORK_OPTIONS}
        try:
            return MSDNet(len(data.class_names), **options)
        except ValueError as error:
            raise UserError(f"impossible network: {error}") from None

    def make_objective(self, network: ExitNetwork, settings: Namespace) -> JointTraining:
        """Build the sum of the exits' losses."""
        return JointTraining(network, settings)

    def title(self, settings: Namespace) -> str:
        """Return the title of a run's curves."""
        return "MSDNet + GE" if settings.gradient_equilibrium else "MSDNet"


def _started_from(origin: Saved, data: DataInfo) -> MSDNet:
    stage_1 = origin.network.backbone if isinstance(origin.network, IMTA) else origin.network
    num_classes = len(data.class_names)
    same_classes = stage_1.num_classes == num_classes and (
        origin.data.class_names == data.class_names or not origin.data.knows_training_images
    )
    network = MSDNet(**{**stage_1.config, "num_classes": num_classes})
    left_out = set() if same_classes else {name for name, _ in stage_1.classifier_parameters()}
    weights = {name: x for name, x in stage_1.state_dict().items() if name not in left_out}
    network.load_state_dict(weights, strict=False)
    return network


def main(argv: list[str] | None = None) -> int:
    """Run stage 1 with these arguments (None: those of the process) and return the exit status."""
    command = parse("GE", argv)
    return run(command, Stage1())


if __name__ == "__main__":
    sys.exit(main())
