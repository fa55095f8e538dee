"""Inline Subnetwork Collaboration (ISC): new classifiers on an MSDNet, each fed with what the one before it concluded.

Li et al., "Improved Techniques for Training Adaptive Deep Networks", ICCV 2019 (arXiv 1908.06294), section 3.2.

    network = IMTA(MSDNet(num_classes=100))
    logits = network(torch.randn(8, 3, 32, 32))  # a list of 5 tensors (8, 100)
"""

import torch
from torch import Tensor, nn

from models.msdnet import MSDNet
from models.network import ExitNetwork


class IMTA(ExitNetwork):
    """Stage-2 network: exit k > 1 reads concat(f_k, g(z_{k-1})), f_k the backbone's pooled features, z_{k-1} the logits of exit k-1.

    Args:
        backbone: the stage-1 network. Its own linear classifiers are not used, except the last one, the teacher of One-for-all.
        isc: False leaves the link g out, and every new classifier reads its own features only (One-for-all alone).
        cut_isc_gradient: the loss of exit k does not reach exit k-1 through the link (the paper); False lets it flow (released code).
        freeze_backbone: parameters of the backbone do not learn. False is the single-stage variant, which trains everything at once and
            whose teacher is its own last exit.
        freeze_batchnorm: BatchNorm of a frozen backbone uses and keeps its stored statistics (the paper); False lets it use and collect
            those of the batches (released code).
    """

    def __init__(
        self,
        backbone: MSDNet,
        isc: bool = True,
        cut_isc_gradient: bool = True,
        freeze_backbone: bool = True,
        freeze_batchnorm: bool = True,
    ):
        super().__init__()
        self.config = {
            "backbone": backbone.config,
            "isc": isc,
            "cut_isc_gradient": cut_isc_gradient,
            "freeze_backbone": freeze_backbone,
            "freeze_batchnorm": freeze_batchnorm,
        }
        self.backbone = backbone
        self.num_exits, self.num_classes = backbone.num_exits, backbone.num_classes
        self.cut_isc_gradient = cut_isc_gradient
        self.freeze_backbone = freeze_backbone
        self.freeze_batchnorm = freeze_backbone and freeze_batchnorm
        widths = [exit.feature_channels for exit in backbone.exits]
        # links[k - 1] is g between exits k - 1 and k.
        self.links = nn.ModuleList(_link(self.num_classes, width) for width in widths[1:]) if isc else None
        self.classifiers = nn.ModuleList(
            nn.Linear(2 * width if isc and k > 0 else width, self.num_classes)
            for k, width in enumerate(widths)
        )
        if freeze_backbone:
            backbone.requires_grad_(False)
        for exit in backbone.exits:  # replaced by the new classifiers
            exit.linear.requires_grad_(False)
        self.train(self.training)  # a frozen backbone goes into evaluation mode

    @property
    def trunk(self) -> MSDNet:
        """The multi-scale network whose features the classifiers read."""
        return self.backbone

    def train(self, mode: bool = True) -> "IMTA":
        """As ``nn.Module.train``, but a frozen backbone stays in evaluation mode: its BatchNorm must not follow the batches."""
        super().train(mode)
        if self.freeze_batchnorm:
            self.backbone.eval()
        return self

    def features(self, images: Tensor, num_exits: int | None = None) -> list[Tensor]:
        """Images (N, 3, H, W) -> the backbone's pooled features (N, C_k) of the first ``num_exits`` exits (None: all)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            return self.backbone.features(images, num_exits)

    def classify_next(self, k: int, features: Tensor, previous_logits: Tensor | None) -> Tensor:
        """Inline Subnetwork Collaboration: logits (N, num_classes) of exit ``k`` from its features (N, C_k) and the logits of exit k - 1
        (None for the first)."""
        if self.links is None or previous_logits is None:
            return self.classifiers[k](features)
        if self.cut_isc_gradient:
            previous_logits = previous_logits.detach()
        return self.classifiers[k](torch.cat([features, self.links[k - 1](previous_logits)], dim=1))

    def teacher_logits(self, features: list[Tensor], logits: list[Tensor]) -> Tensor:
        """Soft targets of One-for-all, without a graph: the last exit of the frozen stage-1 network, or of this network in the
        single-stage variant. ``features`` and ``logits`` are those of all exits; the result is (N, num_classes)."""
        if not self.freeze_backbone:
            return logits[-1].detach()
        with torch.no_grad():
            return self.backbone.classify(features)[-1]


def _link(num_classes: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_classes, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
