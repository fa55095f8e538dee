"""What the networks of both stages have in common: exits that are run one after another."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from models.stepwise import Stepwise

if TYPE_CHECKING:
    from models.msdnet import MSDNet
    from models.saved import Description


class ExitNetwork(nn.Module, ABC):
    """A network with classifiers along its depth. ``config`` holds the plain options that make the same network again."""

    config: dict[str, Any]
    num_exits: int
    num_classes: int
    # What ``models.load`` read beside the weights.
    description: "Description | None" = None
    # Of an ``adaptive_inference.fold``: digest of the network it was made from.
    fingerprint: str | None = None

    @property
    @abstractmethod
    def trunk(self) -> "MSDNet":
        """The multi-scale network whose features the classifiers read."""

    @property
    def minimum_image_size(self) -> int:
        """Smallest height and width in pixels: an exit pools a map of at least 2x2, as in the published networks."""
        trunk = self.trunk
        halvings = trunk.num_scales - 1 + 2 + (0 if trunk.small_inputs else 2)
        return 2**halvings + 1

    def begin(self, images: Tensor, lazy: bool = True) -> Stepwise:
        """A pass over the exits for images (N, 3, H, W) that may stop at any of them; see ``Stepwise``."""
        return Stepwise(self, images, lazy)

    @abstractmethod
    def features(self, images: Tensor, num_exits: int | None = None) -> list[Tensor]:
        """Images (N, 3, H, W) -> the pooled features (N, C_k) of the first ``num_exits`` exits (None: all)."""

    @abstractmethod
    def classify_next(self, k: int, features: Tensor, previous_logits: Tensor | None) -> Tensor:
        """Logits (N, num_classes) of exit ``k`` from its features (N, C_k) and the logits of exit k - 1 (None for the first)."""

    def classify(self, features: list[Tensor]) -> list[Tensor]:
        """Features of the first exits, (N, C_k) each -> their logits, (N, num_classes) each."""
        logits: list[Tensor] = []
        for k, f in enumerate(features):
            logits.append(self.classify_next(k, f, logits[-1] if logits else None))
        return logits

    def forward(self, images: Tensor, num_exits: int | None = None) -> list[Tensor]:
        """Images (N, 3, H, W) -> logits (N, num_classes) of the first ``num_exits`` exits (None: all), shallowest first."""
        return self.classify(self.features(images, num_exits))
