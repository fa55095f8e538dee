"""Stage 2: new classifiers with Inline Subnetwork Collaboration and One-for-all distillation on a frozen stage-1 network.

    python train_IMTA.py                                                # the embedded demo, after train_GE.py
    python train_IMTA.py --pretrained save/cifar100/GE --save save/cifar100/IMTA
    python train_IMTA.py --evalmode                                     # budgeted evaluation of the demo

Network, data and held-out split are those of the stage-1 checkpoint.
"""

import argparse
import hashlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_inference import inference_form
from args import CommandLine
from datasets import DataInfo
from engine.checkpoint import Saved, load_saved
from engine.run_directory import RunDirectory
from engine.stage import Stage, run_stage
from engine.stepper import autocast_dtype
from models import IMTA, MSDNet, one_for_all_loss
from train_GE import make_msdnet
from utils import UserError


class Distillation(nn.Module):
    """Images and targets -> losses (N,) and the logits of all exits (N, K, C)."""

    def __init__(self, network: IMTA, settings: argparse.Namespace):
        super().__init__()
        self.network = network
        # What stays as it is runs as fast as it can: BatchNorm folded, without a graph.
        is_constant = network.freeze_backbone and network.freeze_batchnorm
        # In the type that mixed precision would cast it to in every step.
        dtype = autocast_dtype(settings.amp, next(network.parameters()).device)
        self.frozen = inference_form(network.backbone, channels_last=settings.channels_last, dtype=dtype) if is_constant else None
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
        return one_for_all_loss(logits, targets, teacher_logits, **self.loss_options), torch.stack(logits, dim=1)

    @torch.no_grad()
    def _frozen_features(self, images: Tensor) -> list[Tensor]:
        return self.frozen.features(images)


def find_stage_1(command: CommandLine) -> Saved | None:
    """The checkpoint --pretrained names, or that of the run in the directory GE beside this one's.

    Raises:
        UserError: there is none, or it is of another network than the flags say.
    """
    if command.explicit.get("single_stage"):
        return None
    path = command.explicit.get("pretrained") or command.save_directory.parent / "GE"
    if path.is_dir() or "pretrained" not in command.explicit:
        path = RunDirectory(path).best
    if not path.exists():
        raise UserError(
            f"there is no stage-1 checkpoint {path}: run stage 1 first (run_GE.sh or train_GE.py), or name one with --pretrained"
        )
    saved = load_saved(path, command.explicit)
    if not isinstance(saved.network, MSDNet):
        raise UserError(f"{path} is a stage-2 checkpoint; --pretrained needs one of stage 1")
    return saved


def make_imta(settings: argparse.Namespace, data: DataInfo, origin: Saved | None) -> IMTA:
    """New classifiers on the stage-1 network, or, in the single-stage variant, on a new one."""
    if origin and origin.network.num_classes != len(data.class_names):
        raise UserError(f"{origin.path} has {origin.network.num_classes} classes, the data set {data.name} has {len(data.class_names)}")
    if settings.isc and settings.batch_size < 2:
        raise UserError("--batch-size 1: the BatchNorm of the ISC links needs at least 2 images a step")
    return IMTA(
        origin.network if origin else make_msdnet(settings, data),
        isc=settings.isc,
        cut_isc_gradient=settings.isc_gradient == "cut",
        freeze_backbone=origin is not None,
        freeze_batchnorm=settings.backbone_bn == "frozen",
    )


def frozen_digest(network: IMTA) -> dict[str, Any]:
    """Fingerprint of everything that must not move: the frozen backbone's parameters, and its buffers unless BatchNorm may move."""
    if not network.freeze_backbone:
        return {"frozen_digest": None}
    tensors = network.backbone.state_dict() if network.freeze_batchnorm else dict(network.backbone.named_parameters())
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return {"frozen_digest": digest.hexdigest()}


def check_frozen(network: IMTA, constants: dict[str, Any]) -> None:
    """Compare the backbone with the stage-1 network it was.

    Raises:
        UserError: something frozen moved.
    """
    if frozen_digest(network)["frozen_digest"] != constants["frozen_digest"]:
        raise UserError("the frozen stage-1 network changed during stage 2; its classifiers do not belong to it any more")


def title(settings: argparse.Namespace) -> str:
    """Name of this run in a plot."""
    parts = [name for name, used in (("ISC", settings.isc), ("OFA", settings.ofa and settings.gamma > 0)) if used]
    return " + ".join(["single stage" if settings.single_stage else "stage 2", *parts])


STAGE = Stage(
    name="IMTA",
    find_origin=find_stage_1,
    make_network=make_imta,
    make_objective=Distillation,
    constants=frozen_digest,
    check_result=check_frozen,
    title=title,
    trains_backbone=lambda settings: settings.single_stage or settings.backbone_bn == "moving",
)


def main(argv: list[str] | None = None) -> int:
    """Run stage 2 with these arguments (None: those of the process) and return the exit status."""
    return run_stage(STAGE, argv)


if __name__ == "__main__":
    sys.exit(main())
