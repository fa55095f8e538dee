"""MSDNet: a multi-scale dense network with an exit after every block, trained with Gradient Equilibrium (GE).

MSDNet: Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification", ICLR 2018
(arXiv 1703.09844). GE: Li et al., "Improved Techniques for Training Adaptive Deep Networks", ICCV 2019 (arXiv
1908.06294), section 3.1.

The grid of 3 scales and 1 + 2 + 3 layers, each of which reads its own scale and the next finer one:

    layer    stem   1    2    3    4    5    6
    scale 0    o -- o -- o                        a fine scale is dropped after every third of the layers;
    scale 1    o -- o -- o -- o -- o              a transition, not drawn, then reduces the channels
    scale 2    o -- o -- o -- o -- o -- o -- o
                    |         |              |    an exit reads the coarsest scale
                  exit 0    exit 1         exit 2

Example:
    network = MSDNet(num_blocks=5, step_mode="lin_grow", num_channels=16, growth_rate=6, num_classes=100)
    logits = network(torch.randn(8, 3, 32, 32))  # a list of 5 tensors (8, 100)
"""

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import DenseLayer, Exit, FeatureGrid, Stem, Transition, add_boost
from .lazy import Cell, exit_plans
from .module_state import checkpoint_contexts
from .network import ExitNetwork, Fuse, State, checked_num_exits, fold_sequences
from .options import MSDNET_FIELDS, MSDNetOptions

SMALL_INPUT_EXIT_CHANNELS = 128


class MSDNet(ExitNetwork):
    """Multi-scale dense network with ``num_blocks`` exits.

    Args:
        num_classes: Outputs of every exit.
        options: Fields of ``MSDNetOptions``, which explains them.

    Raises:
        TypeError: An unknown option.
        ValueError: An impossible combination; the message names what was given and what is allowed.
    """

    options_of_older_files: ClassVar = {name: field.default for name, field in MSDNET_FIELDS.items()}

    def __init__(self, num_classes: int = 100, **options: Any):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
        num_classes = operator.index(num_classes)  # NumPy's integers cannot be written into a file
        chosen = MSDNetOptions(**options)
        chosen.check()
        # Plain types only: a checkpoint stores this and rebuilds the network from it.
        plain = {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(chosen).items()
        }
        self.config = {"num_classes": num_classes, **plain}
        self.num_exits, self.num_classes = chosen.num_blocks, num_classes
        self.num_scales = len(chosen.growth_factors)
        self.small_inputs = chosen.small_inputs
        self.gradient_equilibrium = chosen.gradient_equilibrium
        self.gradient_equilibrium_scales = chosen.gradient_equilibrium_scales
        self.boosted = chosen.boosted_exits
        # Channels at the finest scale; scale s has growth_factors[s] times as many.
        width = chosen.num_channels
        self.stem = Stem(_per_scale(width, chosen), self.small_inputs)
        self.blocks, self.exits = nn.ModuleList(), nn.ModuleList()
        next_layer = 1
        for depth in chosen.depths:
            block, width = _make_block(chosen, range(next_layer, next_layer + depth), width)
            next_layer += depth
            self.blocks.append(block)
            coarsest_channels = _per_scale(width, chosen)[-1]
            exit_channels = SMALL_INPUT_EXIT_CHANNELS if self.small_inputs else coarsest_channels
            self.exits.append(Exit(coarsest_channels, exit_channels, num_classes))
        self.feature_dims = tuple(exit_module.feature_channels for exit_module in self.exits)
        self._plans = exit_plans(self.blocks, self.num_scales)
        if chosen.initialization == "he":
            self.apply(_he_normal)

    @property
    def minimum_image_size(self) -> int:
        """Smallest image size in pixels: each exit pools at least 2x2, as in the published networks."""
        halvings = self.num_scales - 1 + 2 + (0 if self.small_inputs else 2)
        return 2**halvings + 1

    def check_image_size(self, size: int) -> None:
        """Raise ValueError if images of ``size`` x ``size`` pixels are too small."""
        if size < self.minimum_image_size:
            needed = self.minimum_image_size
            raise ValueError(f"images of {size} pixels are too small: this network needs at least {needed}")

    def start(self, images: Tensor) -> State:
        """Compute the stem's scales from images (N, 3, H, W)."""
        return {_key((0, scale)): x for scale, x in self.stem(images).items()}

    def advance(self, k: int, state: State) -> tuple[Tensor, State]:
        """Compute the features (n, feature_dims[k]) of exit ``k`` and the state that later exits need.

        Only the scales that this exit depends on are computed (``models.lazy``).
        """
        plan, state = self._plans[k], dict(state)
        layers = [layer for block in self.blocks for layer in block]
        for depth, scale in plan.computed:
            state[_key((depth, scale))] = layers[depth - 1].compute(scale, _scales_at(depth - 1, state))
        features = self.exits[k].features(state[_key(plan.read)])
        return features, {key: state[key] for key in map(_key, plan.kept)}

    def features(self, images: Tensor, num_exits: int | None = None) -> list[Tensor]:
        """Compute the features (N, feature_dims[k]) of the first ``num_exits`` exits (all if None).

        Args:
            images: (N, 3, H, W).
            num_exits: Exits to compute. If None, all.
        """
        all_features = []
        grid = self.stem(images)  # {scale s: (N, C_s, H / 2^s, W / 2^s)}
        for k in range(checked_num_exits(self, num_exits)):
            grid = self._run_block(k, grid)  # more channels, and perhaps fewer fine scales
            remaining_exits = self.num_exits - k
            grid = self._rescale_grid(grid, 1 / remaining_exits)
            all_features.append(self.exits[k].features(grid[self.num_scales - 1]))  # (N, feature_dims[k])
            grid = self._rescale_grid(grid, remaining_exits - 1)
        return all_features

    def classify_next(self, k: int, features: Tensor, previous_logits: Tensor | None) -> Tensor:
        """Compute the logits (N, num_classes) of exit ``k``; only boosted exits read those of exit k - 1."""
        logits = self.exits[k].linear(features)
        return add_boost(logits, previous_logits) if self.boosted else logits

    def classifier_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield name and parameter of the exits' linear layers."""
        for k, exit_module in enumerate(self.exits):
            yield from exit_module.linear.named_parameters(f"exits.{k}.linear")

    def fold_batch_norm(self, fuse: Fuse) -> None:
        """Fold every BatchNorm into the layer before it, in place."""
        fold_sequences(self, fuse)

    def _run_block(self, k: int, grid: FeatureGrid) -> FeatureGrid:
        block = self.blocks[k]
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return block(grid)
        return checkpoint(
            block,
            grid,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(checkpoint_contexts, block),
        )

    def _rescale_grid(self, grid: FeatureGrid, factor: float) -> FeatureGrid:
        """Rescale the gradients of all scales (the paper), or of the exit's scale only (released code)."""
        coarsest = self.num_scales - 1
        every_scale = self.gradient_equilibrium_scales == "all"
        return {s: self.rescale(x, factor) if every_scale or s == coarsest else x for s, x in grid.items()}


def _make_block(options: MSDNetOptions, layer_numbers: range, width: int) -> tuple[nn.Sequential, int]:
    """Make the dense layers of a block, and the transitions after some of them.

    Args:
        options: Options of the network.
        layer_numbers: Numbers of the dense layers, from 1 for the first one of the network.
        width: Input channels at the finest scale.

    Returns:
        The block, and its output channels at the finest scale.

    Raises:
        ValueError: A transition would leave no channel.
    """
    num_layers, num_scales = sum(options.depths), len(options.growth_factors)
    factors = list(options.bottleneck_factors) if options.bottleneck else [None] * num_scales
    scales_after = [remaining_scales(i, num_layers, num_scales, options.prune) for i in range(num_layers + 1)]
    # If s scales are left at the end, only the coarsest is read, so each of the last s - 1 layers computes
    # scales that no exit reads. There, convolutions are not shared, so that the unused weights get no
    # gradient, which a shared convolution would make zero.
    last_fully_used_layer = num_layers - len(scales_after[num_layers]) + 1
    layers: list[nn.Module] = []
    for number in layer_numbers:
        input_scales, scales = scales_after[number - 1], scales_after[number]
        layers.append(
            DenseLayer(
                _per_scale(width, options),
                _per_scale(options.growth_rate, options),
                factors,
                input_scales,
                scales,
                share_convolutions=number <= last_fully_used_layer,
            )
        )
        width += options.growth_rate
        drops_scale = len(scales) < len(input_scales)
        if options.reduction > 0 and _transition_follows(number, num_layers, drops_scale, options.prune):
            reduced_width = math.floor(options.reduction * width)
            if reduced_width < 1:
                raise ValueError(
                    f"reduction {options.reduction} leaves no channel of {width} after layer {number}"
                )
            layers.append(Transition(_per_scale(width, options), _per_scale(reduced_width, options), scales))
            width = reduced_width
    return nn.Sequential(*layers), width


def _per_scale(finest: int, options: MSDNetOptions) -> list[int]:
    """Return the channels at every scale, from those at the finest."""
    return [finest * factor for factor in options.growth_factors]


def _key(cell: Cell) -> str:
    """Return the name of a cell in the state, such as d4_s1 for layer 4 of the grid and scale 1."""
    depth, scale = cell
    return f"d{depth}_s{scale}"


def _scales_at(depth: int, state: State) -> Callable[[int], Tensor]:
    """Return a function that looks up a scale at a depth of the grid."""

    def input_of_scale(scale: int) -> Tensor:
        return state[_key((depth, scale))]

    return input_of_scale


def remaining_scales(layer_number: int, num_layers: int, num_scales: int, prune: str) -> range:
    """Return the scales that layer ``layer_number`` = 1 .. ``num_layers`` computes; layer 0 is the stem."""
    if layer_number == 0:
        return range(num_scales)
    if prune == "max":
        interval = math.ceil(num_layers / num_scales)
        count = num_scales - (layer_number - 1) // interval
    else:
        count = min(num_scales, num_layers - layer_number + 1)
    return range(num_scales - count, num_scales)


def _transition_follows(layer_number: int, num_layers: int, dropped_scale: bool, prune: str) -> bool:
    if prune == "max":
        return dropped_scale
    return layer_number in (num_layers // 3, 2 * num_layers // 3)


def _he_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)
