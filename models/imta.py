"""Inline Subnetwork Collaboration (ISC): new classifiers that also read the previous exit's logits.

Li et al., "Improved Techniques for Training Adaptive Deep Networks", ICCV 2019 (arXiv 1908.06294),
section 3.2.

Example:
    network = IMTA(MSDNet(num_classes=100))
    logits = network(torch.randn(8, 3, 32, 32))  # a list of 5 tensors (8, 100)
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import add_boost
from .network import ExitNetwork, Fuse, State, build_network, fold_sequences, to_config


class IMTA(ExitNetwork):
    """Stage-2 network: exit k > 0 reads concat(f_k, g(z_{k-1})).

    f_k are the backbone's features at exit k, z_{k-1} the logits of exit k - 1, and g links the two exits.

    Args:
        backbone: The stage-1 network, which ``freeze_backbone`` freezes in place. Its own classifiers are
            used only as the teacher of One-for-all.
        isc: False leaves the links out: every new classifier reads its own features only (One-for-all alone).
        cut_isc_gradient: The loss of exit k does not reach exit k-1 through the link (the paper). False lets
            it flow (released code).
        freeze_backbone: Parameters of the backbone are frozen. False is the single-stage variant, which
            trains everything at once and whose teacher is its own last exit.
        freeze_batchnorm: BatchNorm of a frozen backbone uses and keeps its stored statistics (the paper).
            False lets it use and collect those of the batches (released code).
        boosted: Whether exit k adds a share of the logits of exit k-1. If None, as the backbone's exits.
    """

    options_of_older_files: ClassVar = {"boosted": False}

    def __init__(
        self,
        backbone: ExitNetwork,
        isc: bool = True,
        cut_isc_gradient: bool = True,
        freeze_backbone: bool = True,
        freeze_batchnorm: bool = True,
        boosted: bool | None = None,
    ):
        super().__init__()
        self.boosted = backbone.boosted if boosted is None else boosted
        self._options = {
            "isc": isc,
            "cut_isc_gradient": cut_isc_gradient,
            "freeze_backbone": freeze_backbone,
            "freeze_batchnorm": freeze_batchnorm,
            "boosted": self.boosted,
        }
        self.backbone = backbone
        self.num_exits, self.num_classes = backbone.num_exits, backbone.num_classes
        self.feature_dims = backbone.feature_dims
        self.gradient_equilibrium = backbone.gradient_equilibrium
        self.cut_isc_gradient = cut_isc_gradient
        self.freeze_backbone = freeze_backbone
        self.freeze_batchnorm = freeze_backbone and freeze_batchnorm
        widths = self.feature_dims
        # links[k - 1] is g between exits k - 1 and k.
        self.links = nn.ModuleList(_link(self.num_classes, width) for width in widths[1:]) if isc else None
        self.classifiers = nn.ModuleList(
            nn.Linear(2 * width if isc and k > 0 else width, self.num_classes)
            for k, width in enumerate(widths)
        )
        reference = next(backbone.parameters())
        for own in (self.links, self.classifiers):
            if own is not None:
                own.to(reference)  # its device and type
        self._freeze_untrained()
        self.train(self.training)  # a frozen backbone goes into evaluation mode

    @classmethod
    def from_config(cls, config: dict[str, Any], network: nn.Module | None = None) -> "IMTA":
        """Build the network that ``config`` describes; ``network`` is part of its backbone."""
        config = {**cls.options_of_older_files, **config}
        backbone = build_network(config.pop("backbone"), network)
        with torch.device(next(backbone.parameters()).device):
            return cls(backbone, **config)

    def for_classes(self, num_classes: int, same_classes: bool = False) -> "IMTA":
        """Build a network like this one for other classes, with new weights."""
        backbone = self.backbone.for_classes(num_classes, same_classes)
        with torch.device(next(backbone.parameters()).device):
            return type(self)(backbone, **self._options)

    @property
    def config(self) -> dict[str, Any]:
        """Options, of plain types, from which ``from_config`` makes the same network."""
        return {"backbone": to_config(self.backbone), **self._options}

    @property
    def stage_1(self) -> ExitNetwork:
        """The backbone."""
        return self.backbone

    @property
    def is_single_stage(self) -> bool:
        """Whether the backbone is trained too."""
        return not self.freeze_backbone

    @property
    def checkpoint_activations(self) -> bool:
        """Whether the backbone recomputes activations in the backward pass."""
        return self.backbone.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        self.backbone.checkpoint_activations = value

    def train(self, mode: bool = True) -> "IMTA":
        """Set the mode, but keep a frozen backbone in evaluation mode, except BatchNorm that may move."""
        super().train(mode)
        if self.freeze_backbone:
            layers = [m for m in self.backbone.modules() if isinstance(m, _BatchNorm) and m.training]
            self.backbone.eval()
            if not self.freeze_batchnorm:
                for layer in layers:
                    layer.train()
        return self

    def check_image_size(self, size: int) -> None:
        """Raise ValueError if the backbone cannot take images of ``size`` x ``size`` pixels."""
        self.backbone.check_image_size(size)

    def start(self, images: Tensor) -> State:
        """Compute what the backbone's first block reads from images (N, 3, H, W)."""
        return self.backbone.start(images)

    def advance(self, k: int, state: State) -> tuple[Tensor, State]:
        """Compute the features (n, feature_dims[k]) of exit ``k`` and the state that exit k + 1 needs."""
        return self.backbone.advance(k, state)

    def features(self, images: Tensor, num_exits: int | None = None) -> list[Tensor]:
        """Compute the features (N, feature_dims[k]) of the first ``num_exits`` exits (all if None)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            return self.backbone.features(images, num_exits)

    def classify_next(self, k: int, features: Tensor, previous_logits: Tensor | None) -> Tensor:
        """Inline Subnetwork Collaboration: compute the logits (N, num_classes) of exit ``k``.

        Args:
            k: Number of the exit, from 0.
            features: Features of exit ``k``, (N, feature_dims[k]).
            previous_logits: Logits of exit k - 1, (N, num_classes); None for the first exit.
        """
        if self.links is not None and previous_logits is not None:
            linked = previous_logits.detach() if self.cut_isc_gradient else previous_logits
            features = torch.cat([features, self.links[k - 1](linked)], dim=1)
        logits = self.classifiers[k](features)
        return add_boost(logits, previous_logits) if self.boosted else logits

    def teacher_logits(self, features: list[Tensor], logits: list[Tensor]) -> Tensor:
        """Return the soft targets of One-for-all (N, num_classes), without gradient.

        They are the last exit's logits: of the frozen stage-1 network, or of this network in the single-stage
        variant.

        Args:
            features: Features of all exits, (N, feature_dims[k]) each.
            logits: Logits of all exits, (N, num_classes) each.
        """
        if not self.freeze_backbone:
            return logits[-1].detach()
        with torch.no_grad():
            return self.backbone.classify(features)[-1]

    def classifier_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield name and parameter of the classifiers and links, and of the backbone's classifiers."""
        for prefix, module in (("classifiers", self.classifiers), ("links", self.links)):
            if module is not None:
                yield from module.named_parameters(prefix)
        for name, parameter in self.backbone.classifier_parameters():
            yield f"backbone.{name}", parameter

    def pretrained_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the backbone's pretrained parameters."""
        return self.backbone.pretrained_parameters()

    def freeze_pretrained(self) -> None:
        """Freeze the backbone's pretrained parameters."""
        self.backbone.freeze_pretrained()
        self._freeze_untrained()

    def _freeze_untrained(self) -> None:
        """Freeze the backbone if it is to be frozen, and its classifiers always: new ones replace them."""
        if self.freeze_backbone:
            self.backbone.requires_grad_(False)
        for _, parameter in self.backbone.classifier_parameters():
            parameter.requires_grad_(False)

    def fold_batch_norm(self, fuse: Fuse) -> None:
        """Fold every BatchNorm of the backbone and the links into the layer before it, in place."""
        self.backbone.fold_batch_norm(fuse)
        if self.links is not None:
            fold_sequences(self.links, fuse, is_2d=True)  # they read logits (N, num_classes)


def _link(num_classes: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_classes, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
