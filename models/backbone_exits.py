"""The exits of a ``Backbone``: on maps, and on tokens."""

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import conv_bn_relu

WIDTH_LIMITS = (128, 512)  # of the channels of an exit's convolution, where they follow the map's


class MapExit(nn.Module):
    """An exit on maps: average pooling of large maps, convolution, BatchNorm, ReLU, pooling, linear.

    Args:
        channels: Channels of the maps.
        num_classes: Outputs of the linear layer.
        channels_last: Whether maps are (N, H, W, C) and not (N, C, H, W).
        width: Channels of the convolution. If None, those of the maps, within ``WIDTH_LIMITS``.
        size: Maps of at least twice this many pixels a side are first averaged to about this size, so that
            the first exits cost no more than others. If None, no map is averaged.
    """

    def __init__(
        self, channels: int, num_classes: int, channels_last: bool, width: int | None, size: int | None
    ):
        super().__init__()
        self.channels, self.channels_last, self.size = channels, channels_last, size
        fewest, most = WIDTH_LIMITS
        self.feature_channels = min(max(channels, fewest), most) if width is None else width
        self.convolution = conv_bn_relu(channels, self.feature_channels, 3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(self.feature_channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return pooled features (N, feature_channels) of maps (N, C, H, W), or (N, H, W, C)."""
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        window = 1 if self.size is None else min(x.shape[-2:]) // self.size
        if window > 1:
            x = F.avg_pool2d(x, window)
        if 1 in x.shape[-2:]:
            # In bfloat16, oneDNN leaves the gradients of weights that meet nothing but padding undefined.
            x = F.pad(x, (0, int(x.shape[-1] == 1), 0, int(x.shape[-2] == 1)))
        return self.pool(self.convolution(x)).flatten(1)


class TokenExit(nn.Module):
    """An exit on tokens: LayerNorm, mean, linear.

    Args:
        channels: Channels of a token.
        num_classes: Outputs of the linear layer.
        channels_first: Whether tokens are (N, C, L) and not (N, L, C).
        has_tokens: False: there is one vector (N, C) per image.
    """

    def __init__(self, channels: int, num_classes: int, channels_first: bool, has_tokens: bool = True):
        super().__init__()
        self.channels_first, self.has_tokens = channels_first, has_tokens
        self.feature_channels = channels
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the mean (N, C) of normalised tokens (N, L, C), or (N, C, L)."""
        if self.channels_first:
            x = x.transpose(1, 2)
        x = self.norm(x)
        return x.mean(dim=1) if self.has_tokens else x


def make_exit(
    shape: tuple[int, ...], layout: str, num_classes: int, width: int | None, size: int | None
) -> MapExit | TokenExit:
    """Make the exit for tensors of this shape and layout (``cutting.LAYOUTS``).

    Args:
        shape: Shape of the tensors.
        layout: Their layout.
        num_classes: Outputs of the linear layer.
        width: Width of exits on maps, as for ``MapExit``.
        size: Size of the maps, as for ``MapExit``.
    """
    channels = shape[layout.index("C")]
    if len(layout) == 4:
        return MapExit(channels, num_classes, layout == "NHWC", width, size)
    return TokenExit(channels, num_classes, channels_first=layout == "NCL", has_tokens=layout != "NC")


def check_exit_options(**options: int | None) -> None:
    """Raise ValueError unless every option is a positive integer or None."""
    for name, value in options.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be a positive integer or None")
