"""Promises about accuracy: policies that lose at most so much against the full network.

Example:
    curve = with_certified_points(curve, logits, targets, full_policy)  # of held-out images
    point = choose(curve, max_loss=MaxLoss(1.0, level=95.0))

"Learn then Test" (Angelopoulos et al. 2021, arXiv 2110.01052): some held-out images set the thresholds of a
curve of policies. The others test these one after another, from the full network to the cheapest, up to the
first one that may lose too much. A loss is 1 for an image on which the policy is wrong and the full network
right, -1 the other way round, 0 otherwise; or 1 for every image with another class ("disagreement").

The promise: P(expected loss on a new image > limit) is at most 1 - level, over the draw of the held-out
images, if these and new images are drawn independently from one distribution. ``docs/promises.md`` has the
method and its conditions.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from adaptive_inference.budgeted import ExitPredictions, geometric_thresholds
from adaptive_inference.calibration import with_ensemble
from adaptive_inference.confidence import ALL_LEAVE, NONE_LEAVE, assign_exits, without_half_precision
from adaptive_inference.points import evaluate_points
from adaptive_inference.policies import LossCounts, Point, Policy, PolicyCurve
from utils import UserError

CONFIDENCE_PERCENT = 95.0
LEARNING_SHARE = 0.1  # quantiles need few images, and the test is sharper with many
SPLIT_SEED = 0
CERTIFICATE = {
    "procedure": "Learn then Test, fixed sequence from the full network to the cheapest policy",
    "reference": "the last exit for every image, with the ensemble of exits where there is one",
    "tests": "binomial for disagreement; trinomial, maximised over the share of changed images, for accuracy",
    "learning_share": LEARNING_SHARE,
    "split_seed": SPLIT_SEED,
}
# Probability that the share of changed images lies outside the interval that is searched for the maximum.
NUISANCE_ERROR = 1e-5
NUISANCE_VALUES = 16  # at which the search begins
GRID_ERROR = 0.1  # share by which the largest of these values may miss the maximum near it
GOLDEN, GOLDEN_STEPS = (math.sqrt(5) - 1) / 2, 10


class MaxLoss(NamedTuple):
    """Limit on what a policy may lose against the full network.

    Attributes:
        percent: Limit on the mean loss, in percent of the images.
        level: Confidence that the limit is kept, in percent.
        disagreement: Whether every prediction that differs from the full network's counts, right or wrong.
    """

    percent: float
    level: float = CONFIDENCE_PERCENT
    disagreement: bool = False

    def __str__(self) -> str:
        what = "disagree with the full network on" if self.disagreement else "lose"
        return f"{what} at most {self.percent:g} % with {self.level:g} % confidence"

    def points(self, curve: PolicyCurve) -> list[Point]:
        """Return the points of ``curve`` that keep the promise, the full network first.

        Raises:
            UserError: The curve has no certified points, or its last one is not the full network.
            ValueError: Percent or level are out of range.
        """
        if curve.certificate != CERTIFICATE:
            raise UserError(
                "nothing can be promised about accuracy: these policies were not tested on held-out "
                "images in the way of this version; --evalmode dynamic tests them"
            )
        points = certified(curve.points, self)
        if not points:
            raise UserError("nothing can be promised about accuracy: the full network is not the last policy")
        return points


def learning_images(num_images: int, seed: int = SPLIT_SEED) -> Tensor:
    """Return which held-out images set the thresholds, (num_images,) bool; the others test them."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    return order < round(LEARNING_SHARE * num_images)


def with_certified_points(
    curve: PolicyCurve, logits: Tensor, targets: Tensor, full_policy: Policy, num_points: int = 40
) -> PolicyCurve:
    """Return ``curve`` with certified points added; the full network is always one of them.

    Args:
        curve: Policies of the network that gave the logits.
        logits: (K, N, C) of held-out images.
        targets: (N,).
        full_policy: Measure, temperatures and ensemble of all policies, as for ``finding.find_policies``.
        num_points: See ``certified_points``.
    """
    logits, targets = without_half_precision(logits.detach().cpu()), targets.cpu()
    predictions = ExitPredictions.from_logits(logits, targets, full_policy.measure)
    predictions, operations = with_ensemble(predictions, logits, full_policy.ensemble, curve.operations)
    points = certified_points(predictions, full_policy, operations, num_points)
    return replace(curve, points=curve.points + points, certificate=CERTIFICATE)


def certified_points(
    val: ExitPredictions,
    policy: Policy,
    operations: Sequence[float],
    num_points: int = 40,
    seed: int = SPLIT_SEED,
) -> tuple[Point, ...]:
    """Return policies with the counts of their losses, the full network last.

    Args:
        val: Predictions for the held-out images, with the classes of the ensemble if there is one.
        policy: Measure, temperatures and ensemble of the policies.
        operations: Operations to each exit, K numbers.
        num_points: Number of policies beside the full network; 0 where the held-out images may not be new to
            the network.
        seed: Seed of the split into images that set the thresholds and images that test them.

    Returns:
        Points with their results on the images that test them. Only the full network if there are too few
        images.
    """
    num_exits = len(val.confidence)
    learns = learning_images(len(val.targets), seed)
    full = torch.tensor([[NONE_LEAVE] * (num_exits - 1) + [ALL_LEAVE]], dtype=val.confidence.dtype)
    tested = val
    thresholds = full
    if num_points and learns.any():
        tested = val.subset(~learns)
        thresholds = torch.cat([geometric_thresholds(val.confidence[:, learns], num_points), full])
    rated = evaluate_points("geometric", thresholds, policy, tested, operations)
    return tuple(
        replace(point, rule="certified", losses=count_losses(row, tested))
        for point, row in zip(rated, thresholds, strict=True)
    )


def count_losses(thresholds: Tensor, predictions: ExitPredictions) -> LossCounts:
    """Count the losses of the policy with these thresholds (K,) against the last exit."""
    classes, targets = predictions.classes, predictions.targets
    exits = assign_exits(predictions.confidence, thresholds)
    predicted, full = classes.gather(0, exits[None])[0], classes[-1]
    worse = (full == targets) & (predicted != targets)
    better = (predicted == targets) & (full != targets)
    return LossCounts(len(targets), int(worse.sum()), int(better.sum()), int((predicted != full).sum()))


def certified(points: Sequence[Point], wanted: MaxLoss) -> list[Point]:
    """Return the points of the rule "certified" that keep the promise, from the full network to the cheapest.

    Raises:
        UserError: No point was tested on held-out images.
        ValueError: Percent or level are out of range.
    """
    if not 0 <= wanted.percent <= 100 or not 50 <= wanted.level <= 100:
        raise ValueError(
            f"{wanted} cannot be promised: a loss is 0 to 100 percent, a level of confidence 50 to 100"
        )
    tested = [point for point in points if point.rule == "certified"]
    if not tested:
        raise UserError("nothing can be promised about accuracy: no held-out images tested these policies")
    sequence = sorted(tested, key=lambda point: -point.number)
    return list(takewhile(lambda point: is_certain(point, wanted), sequence))


def is_certain(point: Point, wanted: MaxLoss) -> bool:
    """Return True if the images that tested the point rule out that more than ``wanted`` is lost."""
    if point.policy.runs_everything:
        return True
    return p_value(point.losses, wanted.percent / 100, wanted.disagreement) <= 1 - wanted.level / 100


def p_value(losses: LossCounts, limit: float, disagreement: bool = False) -> float:
    """Return the p-value of the hypothesis that the mean loss is ``limit`` or more.

    Disagreement: the number of other predictions is binomial, and the p-value its lower tail at ``limit``.

    Accuracy: the numbers of worse and better images are trinomial. The hypothesis fixes the difference of
    their probabilities, not their sum, the share of changed images. Outcomes are ordered by the difference of
    the counts, studentised, and the p-value is the largest probability of an outcome at most as large as this
    one, over all sums in a confidence interval of level 1 - ``NUISANCE_ERROR`` (Berger and Boos 1994), plus
    that error.

    Args:
        losses: Counts on the images that test a policy.
        limit: Limit on the mean loss, as a share from 0 to 1.
        disagreement: Whether the loss counts every other prediction, instead of accuracy.
    """
    if limit >= 1:
        return 0.0
    if disagreement:
        return _binomial_tail(losses.other, losses.images, limit)
    return _trinomial_tail(losses.images, losses.worse, losses.better, limit)


def _binomial_tail(count: int, trials: int, chance: float) -> float:
    """Return P(X <= count) of a binomial X."""
    if chance <= 0:
        return 1.0
    numbers = torch.arange(count + 1, dtype=torch.float64)
    logs = -(torch.lgamma(numbers + 1) + torch.lgamma(trials - numbers + 1))
    logs += math.lgamma(trials + 1) + numbers * math.log(chance) + (trials - numbers) * math.log1p(-chance)
    # Never 0, as sums of tiny chances are rounded: nothing has a level of confidence of 100 %.
    return min(max(float(logs.exp().sum()), sys.float_info.min), 1.0)


@lru_cache(maxsize=100_000)
def _trinomial_tail(images: int, worse: int, better: int, limit: float) -> float:
    numbers = torch.arange(images + 1, dtype=torch.float64)
    # By the number of changed images: the largest difference of an outcome that counts as small.
    standard_error = (numbers.clamp(min=images * limit) - images * limit**2).clamp(min=1e-12).sqrt()
    observed = (worse - better - images * limit) / standard_error[worse + better]
    largest_difference = images * limit + observed * standard_error + 1e-9
    log_factorial = torch.lgamma(numbers + 1)

    def chance_as_small(changed: float) -> float:
        up, down = (changed + limit) / 2, max(changed - limit, 0.0) / 2
        same = torch.tensor(1 - changed, dtype=torch.float64)
        log_rest = log_factorial[-1] - log_factorial.flip(0) + torch.xlogy(images - numbers, same)
        ups, downs = _likely_counts(images, up)[:, None], _likely_counts(images, down)[None, :]
        total = ups + downs
        logs = log_rest[total.clamp(max=images)]
        for counts, chance in ((ups, up), (downs, down)):
            log_chance = torch.xlogy(counts, torch.tensor(chance, dtype=torch.float64))
            logs = logs + log_chance - log_factorial[counts]
        as_small = (ups - downs <= largest_difference[total.clamp(max=images)]) & (total <= images)
        return float(logs.exp()[as_small].sum())

    largest = _maximum(chance_as_small, _possible_shares(images, worse + better, limit))
    return min(largest + NUISANCE_ERROR, 1.0)


def _maximum(function: Callable[[float], float], positions: Sequence[float]) -> float:
    """Return the maximum of a smooth function over an interval.

    Args:
        function: Function with few local maxima, each wider than the distance of two positions.
        positions: Across the interval, increasing. Every local maximum among them that comes near the
            largest one is refined by a golden-section search between its neighbours.
    """
    values = [function(position) for position in positions]
    largest = max(values)
    for i, value in enumerate(values):
        first, last = max(i - 1, 0), min(i + 1, len(values) - 1)
        if value == max(values[first : last + 1]) and value >= (1 - GRID_ERROR) * max(values):
            largest = max(largest, _golden_section(function, positions[first], positions[last]))
    return largest


def _golden_section(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the maximum of a function with one local maximum in the interval."""
    inner = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    values = [function(position) for position in inner]
    for _ in range(GOLDEN_STEPS):
        if values[0] >= values[1]:
            high = inner[1]
            inner = [high - GOLDEN * (high - low), inner[0]]
            values = [function(inner[0]), values[0]]
        else:
            low = inner[0]
            inner = [inner[1], low + GOLDEN * (high - low)]
            values = [values[1], function(inner[1])]
    return max(values)


def _possible_shares(images: int, changed: int, limit: float) -> list[float]:
    """Return values across the confidence interval of the share of changed images, by Chernoff's bound."""
    lowest = max(limit, 0.01 / images)
    shares = torch.logspace(math.log10(lowest), 0, 4000, dtype=torch.float64).clamp(max=1.0)
    observed = torch.tensor(changed / images, dtype=torch.float64)
    divergence = torch.xlogy(observed, observed / shares)
    divergence += torch.xlogy(1 - observed, (1 - observed) / (1 - shares).clamp(min=1e-300))
    possible = (images * divergence <= math.log(2 / NUISANCE_ERROR)).nonzero().flatten()
    if len(possible) == 0:  # fewer images changed than the hypothesis allows
        return [lowest]
    # From one value before the interval to one after it, so that both ends are searched too.
    first, last = max(int(possible[0]) - 1, 0), min(int(possible[-1]) + 1, len(shares) - 1)
    return shares[torch.linspace(first, last, NUISANCE_VALUES).long().unique()].tolist()


def _likely_counts(images: int, chance: float) -> Tensor:
    """Return the counts of a binomial but for a share of about 1e-10 of its outcomes."""
    width = 6.5 * math.sqrt(images * chance * (1 - chance)) + 12
    first, last = max(0, math.floor(images * chance - width)), min(images, math.ceil(images * chance + width))
    return torch.arange(first, last + 1)
