"""The modules of MSDNet: convolutions, layers of the grid, exits (MSDNet paper, section 4).

A feature grid is a dictionary ``{scale: tensor (N, channels, H, W)}``. Scale 0 is the finest, and each
further scale has half the resolution. The layers of the grid are ``DenseLayer`` and ``Transition``.
``forward`` computes all scales at once, for training, and a dense layer then shares convolutions between
scales. ``compute(scale, input_of_scale)`` computes one scale from scales of the previous layer, which
``input_of_scale`` returns: so only what an exit reads is computed (``models.lazy``). The tests compare the
two.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .module_state import is_changed

FeatureGrid = dict[int, Tensor]
PREVIOUS_LOGITS_WEIGHT = 0.5  # weight of the previous exit's logits, in boosted exits


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = False
) -> nn.Sequential:
    """Make a convolution with "same" padding, batch normalisation and ReLU.

    They map (N, in, H, W) to (N, out, ceil(H / stride), ceil(W / stride)).
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def bottleneck_conv(
    in_channels: int, out_channels: int, stride: int, bottleneck_factor: int | None
) -> nn.Sequential:
    """Make the paper's *normal* (stride 1) or *down* (stride 2) transformation.

    A 1x1 convolution to ``min(in_channels, bottleneck_factor * out_channels)`` channels comes before the 3x3
    one; None leaves it out.
    """
    if bottleneck_factor is None:
        return conv_bn_relu(in_channels, out_channels, 3, stride)
    inner_channels = min(in_channels, bottleneck_factor * out_channels)
    return nn.Sequential(
        *conv_bn_relu(in_channels, inner_channels, 1), *conv_bn_relu(inner_channels, out_channels, 3, stride)
    )


class Stem(nn.Module):
    """The stem: the image at the finest scale, then one strided convolution for every further scale.

    Args:
        channels: Output channels of every scale, finest first.
        small_inputs: 3x3 stride-1 convolution (CIFAR) instead of 7x7 stride 2 and a max-pool (ImageNet).
    """

    def __init__(self, channels: Sequence[int], small_inputs: bool):
        super().__init__()
        if small_inputs:
            finest = conv_bn_relu(3, channels[0], 3)
        else:
            finest = nn.Sequential(
                *conv_bn_relu(3, channels[0], 7, stride=2, bias=True), nn.MaxPool2d(3, stride=2, padding=1)
            )
        coarser = [conv_bn_relu(channels[s - 1], channels[s], 3, stride=2) for s in range(1, len(channels))]
        self.scales = nn.ModuleList([finest, *coarser])

    def forward(self, images: Tensor) -> FeatureGrid:
        """Compute all scales from images (N, 3, H, W)."""
        grid, x = {}, images
        for scale, transform in enumerate(self.scales):
            grid[scale] = x = transform(x)
        return grid


class GridLayer(nn.Module, ABC):
    """A layer of the grid that computes the scales in ``self.scales`` from those of the previous layer."""

    scales: range

    @abstractmethod
    def compute(self, scale: int, input_of_scale: Callable[[int], Tensor]) -> Tensor:
        """Compute one scale of this layer; ``input_of_scale`` returns a scale of the previous layer."""

    def reads(self, scale: int) -> tuple[int, ...]:
        """Return the scales of the previous layer that ``scale`` of this layer depends on."""
        return (scale,)

    def forward(self, grid: FeatureGrid) -> FeatureGrid:
        """Compute all scales."""
        return {scale: self.compute(scale, grid.__getitem__) for scale in self.scales}


class DenseLayer(GridLayer):
    """One layer of MSDNet: every scale keeps its input and adds ``growth[scale]`` channels (paper, figure 2).

    The finest scale of the network adds normal(x_s). Every scale that has a finer one in the previous layer
    adds down(x_{s-1}) and normal(x_s), half of the new channels each.

    Args:
        width: Input channels of every scale.
        growth: New channels of every scale.
        bottleneck_factors: Factor of every scale, for the inputs that come from it; None for no bottleneck.
        input_scales: Scales of the previous layer.
        output_scales: Scales of this layer; finer ones are dropped here.
        share_convolutions: Run the two 1x1 convolutions that read one scale as one in ``forward``. An unused
            branch then gets zero gradients instead of None.
    """

    def __init__(
        self,
        width: Sequence[int],
        growth: Sequence[int],
        bottleneck_factors: Sequence[int | None],
        input_scales: range,
        output_scales: range,
        share_convolutions: bool = True,
    ):
        super().__init__()
        self.scales = output_scales
        self.share_convolutions = share_convolutions
        self.normal, self.down = nn.ModuleDict(), nn.ModuleDict()
        for s in output_scales:
            has_finer = s - 1 in input_scales
            new_channels = growth[s] // 2 if has_finer else growth[s]
            self.normal[str(s)] = bottleneck_conv(width[s], new_channels, 1, bottleneck_factors[s])
            if has_finer:
                self.down[str(s)] = bottleneck_conv(width[s - 1], new_channels, 2, bottleneck_factors[s - 1])

    def reads(self, scale: int) -> tuple[int, ...]:
        """Return ``scale`` itself, and the next finer one where ``down`` reads it."""
        return (scale, scale - 1) if str(scale) in self.down else (scale,)

    def compute(self, scale: int, input_of_scale: Callable[[int], Tensor]) -> Tensor:
        """Compute one scale: concat(x_s, down(x_{s-1}), normal(x_s))."""
        key = str(scale)
        x = input_of_scale(scale)
        from_finer = [self.down[key](input_of_scale(scale - 1))] if key in self.down else []
        return torch.cat([x, *from_finer, self.normal[key](x)], dim=1)

    def forward(self, grid: FeatureGrid) -> FeatureGrid:
        """Compute all scales; faster than one by one, as normal(x_s) and down(x_s) share a convolution."""
        normal, down = {}, {}
        apply = apply_both if self.share_convolutions else apply_each
        for s, x in grid.items():
            same_scale, coarser_scale = str(s), str(s + 1)
            if same_scale not in self.normal:  # dropped here: only the coarser scale reads it
                down[s + 1] = self.down[coarser_scale](x)
            elif coarser_scale not in self.down:  # the coarsest
                normal[s] = self.normal[same_scale](x)
            else:
                normal[s], down[s + 1] = apply(self.normal[same_scale], self.down[coarser_scale], x)
        return {
            s: torch.cat([grid[s], *([down[s]] if s in down else []), normal[s]], dim=1) for s in self.scales
        }


def apply_each(first: nn.Module, second: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``first(x)`` and ``second(x)``."""
    return first(x), second(x)


def apply_both(first: nn.Sequential, second: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``first(x)`` and ``second(x)``; if both begin with a plain 1x1 convolution, run the two as one.

    One wide convolution reads ``x`` once, and its channels fill vector registers better than those of two
    narrow ones.
    """
    convolutions = first[0], second[0]
    if any(type(c) is not nn.Conv2d or c.kernel_size != (1, 1) or is_changed(c) for c in convolutions):
        return apply_each(first, second, x)
    if (first[0].bias is None) != (second[0].bias is None):  # BatchNorm is folded into one of the two
        return apply_each(first, second, x)
    weight = torch.cat([convolution.weight for convolution in convolutions])
    # Convolutions have a bias only where BatchNorm is folded into them.
    bias = None if first[0].bias is None else torch.cat([convolution.bias for convolution in convolutions])
    output, done = F.conv2d(x, weight, bias), 1
    # In a folded network ReLU comes next. On the two parts, which are strided, it takes four times as long.
    if all(type(layers[1]) is nn.ReLU and not is_changed(layers[1]) for layers in (first, second)):
        output, done = first[1](output), 2
    outputs = list(output.split([convolution.out_channels for convolution in convolutions], dim=1))
    for i, layers in enumerate((first, second)):
        for layer in list(layers)[done:]:
            outputs[i] = layer(outputs[i])
    return outputs[0], outputs[1]


class Transition(GridLayer):
    """1x1 convolutions that reduce the channels of every scale.

    They follow a layer that dropped a scale, or with ``prune="min"`` each third of the depth but the last.
    """

    def __init__(self, width: Sequence[int], reduced_width: Sequence[int], scales: range):
        super().__init__()
        self.scales = scales
        self.reduce = nn.ModuleDict({str(s): conv_bn_relu(width[s], reduced_width[s], 1) for s in scales})

    def compute(self, scale: int, input_of_scale: Callable[[int], Tensor]) -> Tensor:
        """Compute one scale: reduce(x_s)."""
        return self.reduce[str(scale)](input_of_scale(scale))


class Exit(nn.Module):
    """An exit on the coarsest scale: two strided convolutions, average pooling, a linear classifier.

    The released code pools 2x2 windows, which at its image sizes is the whole 2x2 map. Pooling the whole
    map is the same there, and keeps the number of features independent of the image size.

    Args:
        in_channels: Channels of the coarsest scale.
        feature_channels: Channels of both convolutions, and number of pooled features.
        num_classes: Outputs of the linear layer.
    """

    def __init__(self, in_channels: int, feature_channels: int, num_classes: int):
        super().__init__()
        self.feature_channels = feature_channels
        self.convolutions = nn.Sequential(
            conv_bn_relu(in_channels, feature_channels, 3, stride=2),
            conv_bn_relu(feature_channels, feature_channels, 3, stride=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(feature_channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute the pooled features (N, feature_channels) of the coarsest scale (N, in_channels, H, W)."""
        return self.pool(self.convolutions(x)).flatten(1)


def add_boost(logits: Tensor, previous_logits: Tensor | None) -> Tensor:
    """Add half of the previous exit's logits (N, C), if there is one; their gradient stops here.

    Boosted exits (Yu et al., "Boosted Dynamic Neural Networks", AAAI 2023, arXiv 2211.16726): a classifier
    learns what is still wrong with the prediction of the previous exits.
    """
    if previous_logits is None:
        return logits
    return torch.add(logits, previous_logits.detach(), alpha=PREVIOUS_LOGITS_WEIGHT)
