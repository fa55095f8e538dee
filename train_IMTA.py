"""Stage 2: new classifiers with Inline Subnetwork Collaboration and One-for-all distillation on a frozen stage-1 network.

    python train_IMTA.py                                                # the embedded demo, after train_GE.py
    python train_IMTA.py --pretrained save/cifar100/GE --save save/cifar100/IMTA
    python train_IMTA.py --evalmode                                     # budgeted evaluation of the demo

Network, data and held-out split are those of the stage-1 checkpoint.
"""

import hashlib
import sys

from args import CommandLine, announce
from settings import Settings

if __name__ == "__main__":
    announce("IMTA")  # mistakes and --help are answered before PyTorch is loaded

import torch
from torch import Tensor, nn

from adaptive_inference import fold
from engine.checkpoint import Saved
from engine.stage import Stage, run_stage
from engine.stepper import mixed_precision
from models import IMTA, MSDNet, one_for_all_loss
from models.saved import DataInfo
from train_GE import Stage1
from utils import UserError


class Distillation(nn.Module):
    """Images and targets -> losses (N,) and the logits of all exits (N, K, C)."""

    def __init__(self, network: IMTA, settings: Settings):
        super().__init__()
        self.network = network
        # What stays as it is runs as fast as it can: BatchNorm folded, without a graph.
        is_constant = network.freeze_batchnorm
        # In the type that mixed precision would cast it to in every step.
        self.frozen = (
            fold(network.backbone, settings.channels_last, mixed_precision(settings)) if is_constant else None
        )
        self.loss_options = {
            "temperature": settings.temperature,
            "gamma": settings.gamma if settings.ofa else 0.0,
            "kl_mean_over_classes": settings.kl_reduction == "mean",
            "label_smoothing": settings.label_smoothing,
        }

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.features(images) if self.frozen is None else self._frozen_features(images)
        logits = self.network.classify(features)
        teacher_logits = self.network.teacher_logits(features, logits)
        return one_for_all_loss(logits, targets, teacher_logits, **self.loss_options), torch.stack(
            logits, dim=1
        )

    @torch.no_grad()
    def _frozen_features(self, images: Tensor) -> list[Tensor]:
        return self.frozen.features(images)


class Stage2(Stage):
    """New classifiers learn on a stage-1 network that stays as it is; in the single-stage variant everything learns at once."""

    name = "IMTA"
    next_command = "predict.py photo.jpg --model"

    def find_origin(self, command: CommandLine) -> Saved | None:
        """The checkpoint --pretrained names, or that of the run in the directory GE beside this one's.

        Raises:
            UserError, OSError: as of every stage; or it is of a stage-2 network.
        """
        saved = super().find_origin(command)
        if saved is not None and not isinstance(saved.network, MSDNet):
            raise UserError(f"{saved.path} is a stage-2 checkpoint; --pretrained needs one of stage 1")
        return saved

    def make_network(self, settings: Settings, data: DataInfo, origin: Saved | None) -> IMTA:
        """New classifiers on the stage-1 network, or, in the single-stage variant, on a new one."""
        if origin and origin.network.num_classes != len(data.class_names):
            raise UserError(
                f"{origin.path} has {origin.network.num_classes} classes, the data set {data.name} has {len(data.class_names)}"
            )
        return IMTA(
            origin.network if origin else Stage1().make_network(settings, data, None),
            isc=settings.isc,
            cut_isc_gradient=settings.isc_gradient == "cut",
            freeze_backbone=origin is not None,
            freeze_batchnorm=settings.backbone_bn == "frozen",
        )

    def make_objective(self, network: IMTA, settings: Settings) -> Distillation:
        """The loss of One-for-all distillation."""
        return Distillation(network, settings)

    def frozen_digest(self, network: IMTA) -> str | None:
        """Of the frozen backbone's parameters, and of its buffers unless BatchNorm may move; None where nothing is frozen."""
        if not network.freeze_backbone:
            return None
        tensors = (
            network.backbone.state_dict()
            if network.freeze_batchnorm
            else dict(network.backbone.named_parameters())
        )
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def title(self, settings: Settings) -> str:
        """Name of this run in a plot."""
        parts = [
            name
            for name, used in (("ISC", settings.isc), ("OFA", settings.ofa and settings.gamma > 0))
            if used
        ]
        return " + ".join(["single stage" if settings.single_stage else "stage 2", *parts])

    def share_of_work(self, settings: Settings) -> float:
        """None where the network is frozen: folded and without a graph it is as fast as compiled (``benchmarks.training_speed``)."""
        return 1.0 if settings.single_stage or settings.backbone_bn == "moving" else 0.0


def main(argv: list[str] | None = None) -> int:
    """Run stage 2 with these arguments (None: those of the process) and return the exit status."""
    return run_stage(Stage2(), argv)


if __name__ == "__main__":
    sys.exit(main())
