"""Normalisation of images, shared by training, evaluation, prediction and export."""

from collections.abc import Sequence

import torch
from torch import Tensor

# ImageNet's statistics for pixel values in [0, 1]; most pretrained networks use them.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalizer:
    """Bytes (N, 3, H, W) -> floats, each channel by its mean and standard deviation.

    Args:
        mean: Mean of each of the three channels, for values from 0 to 1.
        std: Standard deviation of each of the three channels, for values from 0 to 1.
        device: Device of the images.
        memory_format: Memory format of the result.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        memory_format: torch.memory_format = torch.preserve_format,
    ):
        mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (mean, std))
        self.scale, self.shift = (1 / (255 * std)).to(device), (-mean / std).to(device)
        self.device, self.memory_format = device, memory_format

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise a batch."""
        images = images.to(self.scale.dtype, memory_format=self.memory_format)
        return torch.addcmul(self.shift, images, self.scale)
