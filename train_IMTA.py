"""Stage 2: new classifiers with ISC and One-for-all distillation on a frozen stage-1 network.

    python train_IMTA.py                                                # the synthetic demo, after stage 1
    python train_IMTA.py --pretrained save/cifar100/GE --save save/cifar100/IMTA
    python train_IMTA.py --evalmode                                     # budgeted evaluation of the demo

Network, data and held-out split are those of the stage-1 checkpoint.
"""

import os

# Before PyTorch loads; train_GE.py says why.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hashlib
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor, nn

from adaptive_inference import fold
from args import STAGES
from engine.checkpoint import LoadedNetwork, load_saved
from engine.networks import new_network
from engine.run import end_program, run
from engine.run_directory import RunDirectory
from engine.runtime.precision import amp_dtype
from engine.stage import Stage
from models import IMTA, one_for_all_loss
from models.description import DataInfo
from settings.command_line import CommandLine, parse
from utils import UserError


class Stage2Objective(nn.Module):
    """The loss of stage 2: images and targets -> losses (N,) and the logits of all exits (N, K, C)."""

    def __init__(self, network: IMTA, settings: Namespace):
        super().__init__()
        self.network = network
        self.folded_backbone = None
        if network.freeze_batchnorm:
            # The frozen backbone runs with BatchNorm folded and without autograd, in the dtype of mixed
            # precision. The teacher's classifiers are read from the original, which folding does not touch.
            self.folded_backbone = fold(network.backbone, settings.channels_last, amp_dtype(settings))
        self.loss_options = {
            "temperature": settings.temperature,
            "gamma": settings.gamma if settings.ofa else 0.0,
            "kl_mean_over_classes": settings.kl_reduction == "mean",
            "label_smoothing": settings.label_smoothing,
        }

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute losses and logits of images (N, 3, H, W) with targets (N,)."""
        features = self.backbone_features(images)
        logits = self.network.classify(features)
        is_distilled = self.loss_options["gamma"] > 0
        teacher_logits = self.network.teacher_logits(features, logits) if is_distilled else None
        losses = one_for_all_loss(logits, targets, teacher_logits, **self.loss_options)
        return losses, torch.stack(logits, dim=1)

    def backbone_features(self, images: Tensor) -> list[Tensor]:
        """Compute the features of all exits, with the folded copy of the backbone if there is one."""
        if self.folded_backbone is None:
            return self.network.features(images)
        with torch.no_grad():
            return self.folded_backbone.features(images)


class Stage2(Stage):
    """The training of new classifiers on a frozen stage-1 network; single-stage: of everything."""

    spec = STAGES["IMTA"]
    origin_title = "stage 1"
    frozen_changed_message = (
        "the frozen stage-1 network changed during stage 2; its classifiers do not belong to it any more"
    )
    next_command = "predict.py photo.jpg --model"

    def find_origin(self, command: CommandLine) -> LoadedNetwork | None:
        """Load the network that --pretrained names, or that of the run of stage 1 beside this one.

        Raises:
            UserError, OSError: It is not there, cannot be read, or is a stage-2 network.
        """
        if "single_stage" in command.typed:
            return None
        origin = load_saved(command.pretrained_run or _stage_1_beside(command))
        if isinstance(origin.network, IMTA):
            raise UserError(f"{origin.path} is a stage-2 checkpoint; --pretrained needs one of stage 1")
        command.refuse_other_network(origin.path, origin.network)
        return origin

    def make_network(self, settings: Namespace, data: DataInfo, origin: LoadedNetwork | None) -> IMTA:
        """Build new classifiers on the stage-1 network, or, in the single-stage variant, on a new one."""
        if origin and origin.network.num_classes != len(data.class_names):
            raise UserError(
                f"{origin.path} has {origin.network.num_classes} classes, the data set {data.name} has "
                f"{len(data.class_names)}"
            )
        return IMTA(
            origin.network if origin else new_network(settings, data),
            isc=settings.isc,
            cut_isc_gradient=settings.isc_gradient == "cut",
            freeze_backbone=origin is not None,
            freeze_batchnorm=settings.backbone_bn == "frozen",
        )

    def make_objective(self, network: IMTA, settings: Namespace) -> Stage2Objective:
        """Build the loss of One-for-all distillation."""
        return Stage2Objective(network, settings)

    def frozen_digest(self, network: IMTA) -> str | None:
        """Return a digest of the frozen backbone, None if it is trained.

        With --backbone-bn moving it leaves out the running statistics, which follow the batches.
        """
        if not network.freeze_backbone:
            return None
        backbone = network.backbone
        tensors = backbone.state_dict() if network.freeze_batchnorm else dict(backbone.named_parameters())
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def title(self, network: IMTA, settings: Namespace) -> str:
        """Return the title of a run's curves."""
        parts = ["single stage" if settings.single_stage else "stage 2"]
        if settings.isc:
            parts.append("ISC")
        if settings.ofa and settings.gamma > 0:
            parts.append("OFA")
        return " + ".join(parts)

    def compile_speedup_share(self, settings: Namespace) -> float:
        """Return 0 where the network is frozen: folded and without autograd it is as fast as compiled."""
        return 1.0 if settings.single_stage or settings.backbone_bn == "moving" else 0.0


def _stage_1_beside(command: CommandLine) -> Path:
    """Return the network of stage 1 in the directory GE beside the directory of this run.

    Raises:
        UserError: There is none.
    """
    path = RunDirectory(command.save_directory.parent / command.spec.previous).best
    if not path.exists():
        raise UserError(
            f"there is no stage-1 checkpoint {path}: "
            "run stage 1 first (train_GE.py), or name one with --pretrained"
        )
    return path


def main(argv: list[str] | None = None) -> int:
    """Run stage 2 with these arguments (those of the process if None) and return the exit status."""
    stage = Stage2()
    return run(parse(stage.name, argv), stage)


if __name__ == "__main__":
    end_program(main())
