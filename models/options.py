"""The options of an MSDNet's architecture: the one list that the network and its checkpoints follow.

docs/extending.md says how to add one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_LAYERS = 1000
CHOICES = {
    "step_mode": ("even", "lin_grow"),
    "prune": ("max", "min"),
    "gradient_equilibrium_scales": ("all", "coarsest"),
    "initialization": ("pytorch", "he"),
}
# Values that older files and command lines have for those of today.
FORMER_VALUES = {("gradient_equilibrium_scales", "trunk"): "all"}


@dataclass(frozen=True)
class MSDNetOptions:
    """Architecture of an ``MSDNet``, and how Gradient Equilibrium treats it.

    Values are stored as given; ``check``, which the network calls, refuses impossible ones.

    Attributes:
        num_blocks: Blocks, and so exits, K.
        base: Layers of the first block.
        step: Layers of every further block (even), or their growth (lin_grow).
        step_mode: Block i >= 1 has ``step`` layers (even), or ``step`` * i + 1 (lin_grow).
        num_channels: Channels of the stem at the finest scale.
        growth_rate: New channels of a layer at the finest scale.
        growth_factors: Channel multiple of every scale, finest first; as many as scales.
        bottleneck_factors: At every scale a 1x1 convolution has this many times the new channels.
        bottleneck: Whether there are 1x1 convolutions before the 3x3 ones.
        prune: Drop fine scales evenly over the depth (max) or in the last layers (min).
        reduction: Share of channels that a transition keeps; 0: no transitions.
        small_inputs: Stem and exits of the CIFAR networks, not of the ImageNet ones.
        gradient_equilibrium: Rescale gradients at the exits.
        gradient_equilibrium_scales: Scales whose gradients are rescaled: all (the paper), or the exit's
            (coarsest, released code).
        boosted_exits: An exit adds half of the previous exit's logits to its own (Boosted Dynamic Neural
            Networks).
        initialization: PyTorch's default, or He-normal by fan-out
            (MSDNet's original Torch code, in Lua).
    """

    num_blocks: int = 5
    base: int = 1
    step: int = 1
    step_mode: str = "even"
    num_channels: int = 16
    growth_rate: int = 6
    growth_factors: Sequence[int] = (1, 2, 4)
    bottleneck_factors: Sequence[int] = (1, 2, 4)
    bottleneck: bool = True
    prune: str = "max"
    reduction: float = 0.5
    small_inputs: bool = True
    gradient_equilibrium: bool = True
    gradient_equilibrium_scales: str = "all"
    boosted_exits: bool = False
    initialization: str = "pytorch"

    def __post_init__(self):
        scales = current_value("gradient_equilibrium_scales", self.gradient_equilibrium_scales)
        object.__setattr__(self, "gradient_equilibrium_scales", scales)

    @property
    def depths(self) -> list[int]:
        """Number of layers of every block."""
        return block_depths(self.num_blocks, self.base, self.step, self.step_mode)

    def check(self) -> None:
        """Check that a network can have these options.

        Raises:
            ValueError: The combination is impossible; the message names what was given and what is allowed.
        """
        for name, described in MSDNET_FIELDS.items():
            value, allowed = getattr(self, name), CHOICES.get(name)
            if allowed and value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
            if type(described.default) is int and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        # Refuse absurd sizes early: building millions of layers would take hours.
        if max(self.num_blocks, self.base, self.step) > MAX_LAYERS or sum(self.depths) > MAX_LAYERS:
            raise ValueError(
                f"num_blocks {self.num_blocks}, base {self.base}, step {self.step} make more than "
                f"{MAX_LAYERS} layers"
            )
        growth, bottleneck = self.growth_factors, self.bottleneck_factors
        if not growth or not all(type(n) is int and n >= 1 for n in (*growth, *bottleneck)):
            raise ValueError(
                f"growth_factors {growth} and bottleneck_factors {bottleneck} "
                "must be lists of positive integers"
            )
        if len(growth) != len(bottleneck):
            raise ValueError(
                f"growth_factors {growth} and bottleneck_factors {bottleneck} "
                "must have one number per scale each"
            )
        if not 0 <= self.reduction <= 1:
            raise ValueError(f"reduction is {self.reduction}; it must lie between 0 (no transitions) and 1")
        # A layer can drop one scale: a coarser one is computed from the next finer one of the layer before.
        if self.prune == "min" and sum(self.depths) < len(growth) - 1:
            raise ValueError(
                f"prune min drops a scale per layer: {len(growth)} scales need {len(growth) - 1} layers; "
                f"num_blocks {self.num_blocks}, base {self.base}, step {self.step} make {sum(self.depths)}"
            )
        odd = [s for s in range(1, len(growth)) if self.growth_rate * growth[s] % 2]
        if odd:
            raise ValueError(
                f"growth_rate {self.growth_rate} times growth_factors {growth} must be even at every scale "
                f"but the finest, where it is split in halves; it is odd at scale {odd[0]}"
            )


MSDNET_FIELDS = MSDNetOptions.__dataclass_fields__


def current_value(name: str, value: Any) -> Any:
    """Return the value of an option in the current spelling."""
    return FORMER_VALUES.get((name, value), value)


def block_depths(num_blocks: int, base: int, step: int, step_mode: str) -> list[int]:
    """Return the number of layers of every block."""
    return [base] + [step if step_mode == "even" else step * i + 1 for i in range(1, num_blocks)]
