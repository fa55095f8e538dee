"""Policies: thresholds at which images leave, how predictions are made, and the results of both.

Example:
    curve = read_policy(Path("save/demo/IMTA/policy.json"), network)
    predictor = AdaptivePredictor(network, choose(curve, operations=5e6).policy)
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from adaptive_inference.confidence import MEASURES, NONE_LEAVE
from utils import UserError

# "geometric": the paper's shares. "optimised": thresholds of the highest held-out accuracy. "ensemble":
# optimised for predictions from all exits so far. "certified": for promises about accuracy: thresholds set on
# one part of the held-out images, loss tested on the other.
RULES = ("geometric", "optimised", "certified", "ensemble")
DEFAULT_SHARE = 0.5  # of the operations to the last exit


@dataclass(frozen=True)
class Policy:
    """Rule by which images leave, and by which predictions are made.

    Attributes:
        thresholds: Threshold of every exit, compared with the confidence of its logits.
        measure: Measure of confidence, see ``confidence.next_prediction``.
        temperatures: Temperature of every exit, by which its logits are divided before they become the
            probabilities of a prediction. If None, 1 everywhere. They do not decide which images leave.
        ensemble: One row per exit, of one weight per exit: the prediction at an exit comes from the sum, with
            these weights, of the logits of all exits so far. The exit's own logits decide which images leave;
            temperatures are not used. If None, each exit predicts alone.

    Raises:
        ValueError: Thresholds, temperatures or weights are not one finite number per exit, or the measure is
            unknown.
    """

    thresholds: tuple[float, ...]
    measure: str = "softmax"
    temperatures: tuple[float, ...] | None = None
    ensemble: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self):
        count = len(self.thresholds)
        if not self.thresholds or not all(map(math.isfinite, self.thresholds)):
            raise ValueError(f"thresholds are {self.thresholds}; they must be one finite number per exit")
        if self.measure not in MEASURES:
            raise ValueError(f"measure is {self.measure!r}; allowed: {', '.join(MEASURES)}")
        temperatures = self.temperatures
        if temperatures is not None and not (
            len(temperatures) == count and all(0 < t < math.inf for t in temperatures)
        ):
            raise ValueError(f"temperatures are {temperatures}; they must be one positive number per exit")
        if self.ensemble is not None:
            finite = all(math.isfinite(weight) for row in self.ensemble for weight in row)
            if [len(row) for row in self.ensemble] != [count] * count or not finite:
                raise ValueError(f"weights of an ensemble must be {count} rows of {count} finite numbers")

    @property
    def weights(self) -> tuple[tuple[float, ...], ...]:
        """Weights (K, K) of the logits of all exits in the prediction at each exit.

        Those of the ensemble, or 1 / temperature of the exit alone.
        """
        if self.ensemble:
            return self.ensemble
        count = len(self.thresholds)
        alone = [1 / temperature for temperature in self.temperatures or [1.0] * count]
        return tuple(tuple(alone[k] if j == k else 0.0 for j in range(count)) for k in range(count))

    @property
    def runs_everything(self) -> bool:
        """Whether every image runs to the last exit."""
        return all(threshold >= NONE_LEAVE for threshold in self.thresholds[:-1])


class LossCounts(NamedTuple):
    """Counts of images that bound the loss of a policy against the full network.

    Attributes:
        images: Number of images that tested the policy.
        worse: Number of images on which the policy is wrong and the full network right.
        better: Number of images on which the policy is right and the full network wrong.
        other: Number of images whose class differs from the full network's, right or wrong.
    """

    images: int
    worse: int
    better: int
    other: int


@dataclass(frozen=True)
class Point:
    """A policy and its results on held-out images.

    Attributes:
        policy: Thresholds and the rest.
        val_acc1: Top-1 accuracy in percent.
        operations: Mean operations per image.
        shares: Shares of the images that leave at each exit.
        rule: Rule by which its thresholds were found, one of ``RULES``.
        number: Number of the policy on that rule's curve, from 1 for the cheapest; ``p`` in files and tables.
        losses: Counts on images that the thresholds do not depend on, for the rule "certified" only.
    """

    policy: Policy
    val_acc1: float
    operations: float
    shares: tuple[float, ...]
    rule: str = "geometric"
    number: int = 1
    losses: LossCounts | None = None

    def __post_init__(self):
        if self.rule not in RULES or type(self.number) is not int:
            raise ValueError("a point's rule or p is out of range")
        if not 0 <= self.val_acc1 <= 100 or self.operations <= 0:
            raise ValueError("a point's val_acc1 or operations are out of range")
        if len(self.shares) != len(self.policy.thresholds) or min(self.shares) < 0:
            raise ValueError("a point's shares are not one per exit")
        if abs(sum(self.shares) - 1) > 1e-3:
            raise ValueError("a point's shares do not add up to 1")
        if self.rule == "ensemble" and self.policy.ensemble is None:
            raise ValueError("the weights of its ensemble are missing")
        if self.rule == "certified" and not _are_counts(self.losses):
            raise ValueError("the losses of a certified point are not counts of images")


def _are_counts(losses: LossCounts | None) -> bool:
    if losses is None or not all(type(count) is int and count >= 0 for count in losses):
        return False
    return losses.worse + losses.better <= losses.other <= losses.images and losses.images > 0


@dataclass(frozen=True)
class PolicyCurve:
    """Points of a network, from cheap to full.

    Attributes:
        fingerprint: Digest of the network's configuration and weights.
        dtype: Dtype of the network that gave the logits, such as ``float32``.
        network_description: The network in words.
        operations: Operations to each exit, counted as in the paper.
        points: Points of all rules.
        num_images: Held-out images that the points, temperatures and weights rest on; None if not known.
        certificate: Procedure that counted the losses of the certified points; None where there are none.
    """

    fingerprint: str
    dtype: str
    network_description: str
    operations: tuple[float, ...]
    points: tuple[Point, ...]
    num_images: int | None = None
    certificate: dict[str, Any] | None = None

    def __post_init__(self):
        if not all(
            isinstance(text, str) for text in (self.fingerprint, self.dtype, self.network_description)
        ):
            raise ValueError("its network is not described in words")
        if list(self.operations) != sorted(self.operations) or min(self.operations, default=0) <= 0:
            raise ValueError("its operations do not grow from exit to exit")
        if not self.points or any(len(point.shares) != len(self.operations) for point in self.points):
            raise ValueError("it has no points, or one of another number of exits")
        if self.num_images is not None and (type(self.num_images) is not int or self.num_images < 1):
            raise ValueError("its number of held-out images is not a number of images")

    @property
    def full_operations(self) -> float:
        """Operations of the full network: to the last exit, with the ensemble of exits if there is one."""
        return max(self.operations[-1], *(point.operations for point in self.points))

    def default_point(self, rule: str | None = None) -> Point:
        """Return the default point of ``rule``: the one nearest to half of the operations."""
        return self.nearest(DEFAULT_SHARE * self.operations[-1], rule)

    def nearest(self, operations: float, rule: str | None = None) -> Point:
        """Return the point whose mean operations are nearest to ``operations``."""
        return min(
            self.of_rule(rule), key=lambda point: (abs(point.operations - operations), -point.val_acc1)
        )

    def of_rule(self, rule: str | None) -> tuple[Point, ...]:
        """Return the points found by ``rule``.

        Args:
            rule: If None, the best rule the curve has: ensemble, else optimised, else any.

        Raises:
            UserError: No point was found by ``rule``.
        """
        by_rule: dict[str, list[Point]] = {}
        for point in self.points:
            by_rule.setdefault(point.rule, []).append(point)
        if rule is None:
            return tuple(by_rule.get("ensemble") or by_rule.get("optimised") or self.points)
        if rule not in by_rule:
            known = ", ".join(sorted(by_rule))
            raise UserError(f"no policy here is of the rule {rule}; there are {known}")
        return tuple(by_rule[rule])
