"""The options of an MSDNet's architecture: the one list that the network, its checkpoints and the command line follow.

A new option is a line of ``NetworkOptions``, and its use in ``models.msdnet``; in ``models.imta`` too if it is one of classifiers, which
stage 2 makes anew. A new kind of layer must be known to ``models.operations`` and ``adaptive_inference.export``, and ``models.released``
must refuse what released programs lack. This module imports nothing heavy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_LAYERS = 1000


def option(default: Any, flag: str, help: str, **more: Any) -> Any:
    """A field of a dataclass with its flag on the command line, what it says there, and further keys of ``settings.Settings``."""
    return field(default=default, metadata={"flag": flag, "help": help, **more})


@dataclass(frozen=True)
class NetworkOptions:
    """Architecture of an ``MSDNet``, and how Gradient Equilibrium treats it; the flags bear the published names.

    Raises:
        ValueError: an impossible combination; the message names what was given and what is allowed.
    """

    num_blocks: int = option(5, "--nBlocks", "blocks, and so exits, K")
    base: int = option(1, "--base", "layers of the first block")
    step: int = option(1, "--step", "layers of every further block (even), or their growth (lin_grow)")
    step_mode: str = option(
        "even", "--stepmode", "block i >= 1 has STEP layers, or STEP * i + 1", choices=("even", "lin_grow")
    )
    num_channels: int = option(16, "--nChannels", "channels of the first layer at the finest scale")
    growth_rate: int = option(6, "--growthRate", "new channels of a layer at the finest scale")
    growth_factors: Sequence[int] = option(
        (1, 2, 4), "--grFactor", "channel multiple of every scale, finest first; as many as scales"
    )
    bottleneck_factors: Sequence[int] = option(
        (1, 2, 4), "--bnFactor", "of every scale: a 1x1 convolution has so many times the new channels"
    )
    bottleneck: bool = option(True, "--bottleneck", "1x1 convolutions before the 3x3 ones")
    prune: str = option(
        "max",
        "--prune",
        "drop fine scales evenly over the depth (max) or in the last layers (min)",
        choices=("max", "min"),
    )
    reduction: float = option(0.5, "--reduction", "share of channels a transition keeps; 0: no transitions")
    small_inputs: bool | None = option(
        True, "--small-inputs", "stem and exits of the CIFAR networks, not of the ImageNet ones"
    )
    gradient_equilibrium: bool = option(
        True, "--gradient-equilibrium", "rescale gradients at the exits; off: plain MSDNet", aliases=("--GE",)
    )
    gradient_equilibrium_scales: str = option(
        "trunk",
        "--ge-scales",
        "scales whose gradients are rescaled: all (paper), or the exit's (released code)",
        choices=("trunk", "coarsest"),
    )
    boosted_exits: bool = option(
        False,
        "--boosted-exits",
        "an exit adds its logits to half of those of the exit before (Boosted Dynamic Networks)",
    )
    initialization: str = option(
        "pytorch",
        "--init",
        "PyTorch's default initialisation, or He-normal by fan-out (the Lua program)",
        choices=("pytorch", "he"),
    )

    def check(self) -> None:
        """Raise the ``ValueError`` of an impossible combination."""
        for name, described in NETWORK_FIELDS.items():
            value, allowed = getattr(self, name), described.metadata.get("choices")
            if allowed and value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
            if type(described.default) is int and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        # To build millions of layers would take forever; the published networks have tens.
        counts = {name: getattr(self, name) for name in ("num_blocks", "base", "step")}
        if (
            max(counts.values()) > MOST_LAYERS
            or sum(block_depths(*counts.values(), self.step_mode)) > MOST_LAYERS
        ):
            raise ValueError(
                f"{', '.join(f'{name} {n}' for name, n in counts.items())} make more than {MOST_LAYERS} layers"
            )
        growth, bottleneck = self.growth_factors, self.bottleneck_factors
        if not growth or min(growth) < 1 or min(bottleneck, default=1) < 1:
            raise ValueError(
                f"growth_factors {growth} and bottleneck_factors {bottleneck} must be lists of positive integers"
            )
        if len(growth) != len(bottleneck):
            raise ValueError(
                f"growth_factors {growth} and bottleneck_factors {bottleneck} must have one number a scale each"
            )
        if not 0 <= self.reduction <= 1:
            raise ValueError(f"reduction is {self.reduction}; it must lie between 0 (no transitions) and 1")
        odd = [s for s in range(1, len(growth)) if self.growth_rate * growth[s] % 2]
        if odd:
            raise ValueError(
                f"growth_rate {self.growth_rate} times growth_factors {growth} must be even at every scale but the finest, "
                f"where it is split in halves; it is odd at scale {odd[0]}"
            )


NETWORK_FIELDS = NetworkOptions.__dataclass_fields__


def block_depths(num_blocks: int, base: int, step: int, step_mode: str) -> list[int]:
    """Layers of every block."""
    return [base] + [step if step_mode == "even" else step * i + 1 for i in range(1, num_blocks)]
