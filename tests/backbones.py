"""Small networks of torchvision and of no library, for tests of ``models.Backbone``."""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchvision import models as zoo
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock

from models.backbone import Backbone, build_backbone


class Chain(nn.Module):
    """Convolutions with dropout in a row; the ReLU that follows each is in place."""

    def __init__(self, channels: int = 8, num_classes: int = 10):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [
                nn.Conv2d(channels if i else 3, channels, 3, stride=2, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                nn.Dropout(0.3),
            ]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.layers(images).mean((2, 3)))


def small_resnet() -> nn.Module:
    return zoo.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


def small_convnext() -> nn.Module:
    stages = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 1)]
    return zoo.ConvNeXt(stages, stochastic_depth_prob=0.3, num_classes=10)


def small_swin() -> nn.Module:
    return zoo.SwinTransformer(
        [2, 2], 16, [1, 2, 1], [2, 2, 4], [4, 4], stochastic_depth_prob=0.3, num_classes=10
    )


def small_vit() -> nn.Module:
    return zoo.VisionTransformer(32, 8, 3, 2, 32, 64, dropout=0.1, num_classes=10)


# By name: the network without exits, the exits, and an image size it takes.
SMALL: dict[str, tuple[Callable[[], nn.Module], list[str] | int, int]] = {
    "resnet": (small_resnet, ["layer1", "layer2", "layer3"], 32),
    "mobilenet_v3_small": (partial(zoo.mobilenet_v3_small, num_classes=10), 4, 32),
    "convnext": (small_convnext, 3, 32),
    "swin": (small_swin, 3, 32),
    "vit": (small_vit, 3, 32),
    "chain": (Chain, ["layers.1", "layers.5"], 32),
}


def make_small(name: str, seed: int = 0, **options: object) -> Backbone:
    """Return a network with exits; no weight is zero, and BatchNorm has seen images."""
    make, exits, size = SMALL[name]
    torch.manual_seed(seed)
    network = shaken(make())
    return Backbone(network, exits, **{"image_size": size, **options})


def shaken(network: nn.Module) -> nn.Module:
    """Make constant weights and statistics random: some networks begin with a last layer of zeros."""
    with torch.no_grad():
        for x in [*network.parameters(), *network.buffers()]:
            if x.is_floating_point() and x.numel() and bool((x == x.flatten()[0]).all()):
                x.add_(0.1 * torch.rand_like(x))
    return network


# Networks of the two libraries: name, exits, image size, options of the constructor.
LIBRARIES: dict[str, tuple[list[str] | int, int, dict[str, object]]] = {
    "resnet18": (["layer1", "layer2", "layer3"], 64, {}),
    "mobilenet_v2": (4, 64, {}),
    "mobilenet_v3_small": (4, 64, {}),
    "efficientnet_b0": (4, 64, {}),
    "regnet_y_400mf": (4, 64, {}),
    "densenet121": (4, 64, {}),
    "shufflenet_v2_x0_5": (4, 64, {}),
    "convnext_tiny": (4, 64, {}),
    "swin_t": (4, 64, {}),
    "vit_b_16": (4, 32, {"image_size": 32}),
    "timm/tf_efficientnet_lite0": (4, 64, {}),
    "timm/mobilenetv3_small_050": (4, 64, {}),
    "timm/convnext_atto": (4, 64, {}),
    "timm/vit_tiny_patch16_224": (4, 32, {"img_size": 32}),
    "timm/swin_tiny_patch4_window7_224": (4, 64, {"img_size": 64}),
}


def make_named(name: str) -> Backbone:
    """Return a network of a library with exits and ten classes; no weight is zero."""
    exits, size, options = LIBRARIES[name]
    network = build_backbone(name, exits, 10, image_size=size, options=options)
    shaken(network.network)
    return network


def is_available(name: str) -> bool:
    """Return True if the library of a network is installed."""
    return not name.startswith("timm/") or importlib.util.find_spec("timm") is not None
