"""Fast networks for prediction: BatchNorm folded into the layers before it, channels-last, half precision.

Example:
    fast = fold(network)    # a copy; the same interface, operation counts and, to rounding, logits
    logits = fast(images)

Folding is exact in real arithmetic: a convolution followed by a fixed affine map of each channel is a
convolution with a bias.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from adaptive_inference.fingerprint import network_fingerprint
from models import ExitNetwork, State
from models.module_state import detached_copy, is_changed, set_memory_format

# Types of timm, by name as timm is optional: a convolution that only pads by itself, and BatchNorms with an
# activation inside.
PADDING_CONVOLUTION, NORMS_WITH_ACTIVATION = "Conv2dSame", ("BatchNormAct2d", "SyncBatchNormAct")


class FoldedNetwork(ExitNetwork, register=False):
    """A network for prediction alone, made by ``fold``. It casts images and stays in evaluation mode.

    Args:
        network: Folded, in evaluation mode.
        fingerprint: Fingerprint of the network before folding (``fingerprint.network_fingerprint``).
        memory_format: Memory format of its weights.
    """

    def __init__(self, network: ExitNetwork, fingerprint: str, memory_format: torch.memory_format):
        super().__init__()
        self.network, self.fingerprint, self.memory_format = network, fingerprint, memory_format
        # A buffer follows ``half()``; replicas of DataParallel have buffers but no parameters.
        weights = next(network.parameters())
        self.register_buffer("_like_weights", weights.new_empty(0), persistent=False)
        self.config, self.description = network.config, network.description
        self.num_exits, self.num_classes = network.num_exits, network.num_classes
        self.feature_dims, self.boosted = network.feature_dims, network.boosted
        self.train(False)

    @property
    def kind(self) -> str:
        """Name of the class of the network before folding."""
        return self.network.kind

    @property
    def title(self) -> str:
        """Title of the network before folding."""
        return self.network.title

    @property
    def dtype(self) -> torch.dtype:
        """Data type of its weights."""
        return self._like_weights.dtype

    def train(self, mode: bool = True) -> "FoldedNetwork":
        """Stay in evaluation mode whatever ``mode`` is."""
        return super().train(False)

    def check_image_size(self, size: int) -> None:
        """Raise ValueError if the network cannot take images of ``size`` x ``size`` pixels."""
        self.network.check_image_size(size)

    def start(self, images: Tensor) -> State:
        """Compute what the first block reads from images (N, 3, H, W) of any float type."""
        return self.network.start(self._cast(images))

    def advance(self, k: int, state: State) -> tuple[Tensor, State]:
        """Compute the features of exit ``k`` and the state that exit k + 1 needs."""
        return self.network.advance(k, state)

    def classify_next(self, k: int, features: Tensor, previous_logits: Tensor | None) -> Tensor:
        """Compute the logits of exit ``k``."""
        return self.network.classify_next(k, features, previous_logits)

    def features(self, images: Tensor, num_exits: int | None = None) -> list[Tensor]:
        """Compute the features of the first ``num_exits`` exits from images (N, 3, H, W) of a float type."""
        return self.network.features(self._cast(images), num_exits)

    def classifier_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield name and parameter of the classifiers."""
        for name, parameter in self.network.classifier_parameters():
            yield f"network.{name}", parameter

    def _cast(self, images: Tensor) -> Tensor:
        return images.to(dtype=self.dtype, memory_format=self.memory_format)


def fold(network: ExitNetwork, channels_last: bool = True, dtype: torch.dtype | None = None) -> FoldedNetwork:
    """Return a copy of ``network`` for prediction alone.

    Args:
        network: Any network with exits; it is not changed.
        channels_last: Weights and activations in the memory layout in which convolutions are faster on most
            devices, if the network can run in it.
        dtype: Type of weights and activations, None for the network's. ``engine.runtime.precision`` finds
            the fastest one.

    Returns:
        A network in evaluation mode. It casts images to its type and layout itself, keeps the fingerprint of
        the original (``fingerprint.network_fingerprint``), and can be neither trained, differentiated nor
        saved.
    """
    fingerprint = network_fingerprint(network)
    original = network.network if isinstance(network, FoldedNetwork) else network
    folded = detached_copy(original).eval().requires_grad_(False)
    folded.fold_batch_norm(fuse)
    uses_channels_last = channels_last and folded.stage_1.can_run_channels_last()
    memory_format = torch.channels_last if uses_channels_last else torch.contiguous_format
    folded.to(dtype=dtype)
    set_memory_format(folded, memory_format)
    return FoldedNetwork(folded, fingerprint, memory_format)


def fuse(layer: nn.Module, norm: nn.Module, is_2d: bool = False) -> nn.Module | None:
    """Return one module that computes ``norm(layer(x))`` in evaluation mode, None if there is none.

    Types are compared exactly: a subclass may compute something else. So may a module with hooks or
    parametrisations. The synchronised BatchNorm of ``--sync-bn`` is a plain BatchNorm in evaluation mode.

    Args:
        layer: The layer before the BatchNorm.
        norm: The BatchNorm.
        is_2d: Whether the output of ``layer`` is known to be (N, C). Only then is a linear layer fused: of
            tokens (N, L, C), BatchNorm normalises dimension 1, and a linear layer computes dimension 2.
    """
    if getattr(norm, "running_mean", None) is None or is_changed(layer) or is_changed(norm):
        return None
    if norm.weight is None:  # PyTorch's functions need the factors
        norm = _with_unit_factors(norm)
    if type(layer) is nn.Conv2d or _is_of_timm(layer, PADDING_CONVOLUTION):
        if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
            return fuse_conv_bn_eval(layer, norm)
        if _is_of_timm(norm, *NORMS_WITH_ACTIVATION):
            return nn.Sequential(fuse_conv_bn_eval(layer, norm), norm.drop, norm.act)
    if is_2d and type(layer) is nn.Linear and type(norm) in (nn.BatchNorm1d, nn.SyncBatchNorm):
        return fuse_linear_bn_eval(layer, norm)
    return None


def _with_unit_factors(norm: nn.Module) -> nn.Module:
    """Return a copy of a BatchNorm without learned factors that has them, at one and zero."""
    norm = copy.deepcopy(norm)
    norm.weight = nn.Parameter(torch.ones_like(norm.running_mean), requires_grad=False)
    norm.bias = nn.Parameter(torch.zeros_like(norm.running_mean), requires_grad=False)
    return norm


def _is_of_timm(module: nn.Module, *names: str) -> bool:
    """Return True if a module is of one of these types of timm; other types may have the same name."""
    return type(module).__name__ in names and type(module).__module__.startswith("timm.")
