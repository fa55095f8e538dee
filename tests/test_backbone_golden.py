"""Logits of small backbones against stored ones, so that networks of files keep their predictions.

Weights and images follow from formulas, and everything runs in float64, so that the numbers are the same with
every version of PyTorch.
"""

import zlib

import pytest
import torch
from torch import Tensor, nn

from models import Backbone
from tests.backbones import Chain, small_vit


def waves(count: int, phase: float) -> Tensor:
    return torch.sin(phase + 0.7 * torch.arange(count, dtype=torch.float64))


def fill(network: nn.Module) -> None:
    """Set every weight and every statistic, each from its name and shape."""
    for name, x in network.state_dict().items():
        if not x.is_floating_point():
            continue
        values = waves(x.numel(), zlib.crc32(name.encode()) % 1000).reshape(x.shape)
        if x.dim() > 1:
            x.copy_(values * (x[0].numel() / 4) ** -0.5)
        else:  # a scale and a variance are positive
            is_positive = name.endswith(("running_var", ".weight"))
            x.copy_(1 + values / 2 if is_positive else values / 2)


def logits_of(network: Backbone, image_size: int) -> Tensor:
    """Return the logits of all exits for one image, (num_exits, num_classes)."""
    network = network.double().eval()
    fill(network)
    images = waves(3 * image_size**2, 0).reshape(1, 3, image_size, image_size)
    with torch.no_grad():
        return torch.cat(network(images))


# The exits are at maps of half and a quarter of the image size; those of 28 pixels and more are averaged.
CHAIN_LOGITS = {
    32: [
        [3.582779300937, -3.336550743054, -3.97834600664],
        [-15.245688004671, -1.421435104561, 14.731712984467],
        [-8.218016474336, -6.84320141215, -2.399494678889],
    ],
    64: [
        [-3.621956269661, -3.426304404124, 3.23797935216],
        [-0.593279566521, -1.627868056301, 0.105960998657],
        [-3.808274931131, -2.912470892944, -0.712155285465],
    ],
}
VIT_LOGITS = [
    [-3.464651102578, 3.737474616423, -5.070543418784],
    [-4.956362025639, 2.015433385748, -0.157172756175],
    [-0.723993523387, 2.674586434118, -5.11068992316],
]


@pytest.mark.parametrize("image_size", CHAIN_LOGITS)
def test_exits_on_maps(image_size):
    network = Backbone(Chain(), ["layers.2", "layers.6"], num_classes=3)
    expected = torch.tensor(CHAIN_LOGITS[image_size], dtype=torch.float64)
    torch.testing.assert_close(logits_of(network, image_size), expected, rtol=0, atol=1e-9)


def test_exits_on_tokens():
    network = Backbone(small_vit(), 3, num_classes=3, image_size=32)
    expected = torch.tensor(VIT_LOGITS, dtype=torch.float64)
    torch.testing.assert_close(logits_of(network, 32), expected, rtol=0, atol=1e-9)
