"""The points of a policy curve: results of policies on held-out images, and the choice of one.

Example:
    points = evaluate_points("optimised", thresholds, policy, val, operations)
    point = choose(curve, operations=12.5e6)
    point = choose(curve, accuracy=70, max_loss=MaxLoss(1.0))    # MaxLoss of ``promises.risk``
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from adaptive_inference.budgeted import ExitPredictions, evaluate_thresholds
from adaptive_inference.policies import Point, Policy, PolicyCurve
from utils import UserError


def evaluate_points(
    rule: str, thresholds: Tensor, policy: Policy, val: ExitPredictions, operations: Sequence[float]
) -> tuple[Point, ...]:
    """Return one point for each row of thresholds.

    Args:
        rule: Name of the rule that found them.
        thresholds: (P, K).
        policy: Measure, temperatures and ensemble of all of them.
        val: Predictions for held-out images.
        operations: Operations to each exit, K numbers.
    """
    points = []
    for number, row in enumerate(thresholds, start=1):
        result = evaluate_thresholds(row, val, operations)
        points.append(Point(replace(policy, thresholds=tuple(row.tolist())), *result, rule, number))
    return tuple(points)


@runtime_checkable
class Promise(Protocol):
    """A promise that some points of a curve keep, such as ``promises.risk.MaxLoss``."""

    def points(self, curve: PolicyCurve) -> list[Point]:
        """Return the points that keep it, or raise a UserError that says what could be promised."""


def choose(
    curve: PolicyCurve,
    *,
    operations: float | None = None,
    accuracy: float | None = None,
    max_loss: Promise | None = None,
    rule: str | None = None,
) -> Point:
    """Return the most accurate point within a budget, or the cheapest one where no budget is given.

    Args:
        curve: The points to choose from.
        operations: Largest mean of operations per image.
        accuracy: See ``eligible_points``.
        max_loss: See ``eligible_points``.
        rule: See ``eligible_points``.

    Raises:
        UserError: No point satisfies the request; the line says what is possible.
    """
    if isinstance(operations, str):
        raise UserError(f"operations is {operations!r}; it is a number of operations, such as 20e6")
    points = eligible_points(curve, accuracy, max_loss, rule)
    if operations is None:
        return min(points, key=lambda point: (point.operations, -point.val_acc1))
    costs = [point.operations / 1e6 for point in points]
    points = points_within_budget(points, costs, operations / 1e6, "M", curve.full_operations / 1e6)
    return max(points, key=lambda point: (point.val_acc1, -point.operations))


def eligible_points(
    curve: PolicyCurve,
    accuracy: float | None = None,
    max_loss: Promise | None = None,
    rule: str | None = None,
) -> list[Point]:
    """Return the points that reach an accuracy, keep a promise, and are of a rule.

    Args:
        curve: The points to choose from.
        accuracy: On held-out images at least, in percent.
        max_loss: A promise about accuracy that the point must keep, ``promises.risk.MaxLoss``.
        rule: Only points found by this rule. If None, as for ``PolicyCurve.of_rule``. ``max_loss`` has a rule
            of its own.

    Raises:
        UserError: No point satisfies the request; the line says what is possible.
        ValueError: ``max_loss`` and ``rule`` are both given.
        TypeError: ``max_loss`` is not a ``Promise``.
    """
    if max_loss is not None and not isinstance(max_loss, Promise):
        raise TypeError(f"max_loss is {max_loss!r}; it must be a promise, such as promises.risk.MaxLoss(1.0)")
    if max_loss is not None and rule is not None:
        raise ValueError(f"max_loss has a rule of its own, certified; {rule} promises nothing")
    points = list(curve.of_rule(rule)) if max_loss is None else max_loss.points(curve)
    reached = [point for point in points if accuracy is None or point.val_acc1 >= accuracy]
    if not reached:
        best = max(point.val_acc1 for point in points)
        limited = "" if max_loss is None else " that is certain to lose so little"
        raise UserError(
            f"no policy{limited} reaches {accuracy:g} % on the held-out images; the best has {best:.2f} %"
        )
    return reached


def points_within_budget(
    points: Sequence[Point], costs: Sequence[float], limit: float, unit: str, whole: float | None = None
) -> list[Point]:
    """Return the points whose cost is at most ``limit``.

    Args:
        points: The points to choose from.
        costs: Cost of every point.
        limit: In the unit of the costs.
        unit: For the error.
        whole: Cost of the full network, from which the error computes a percentage.

    Raises:
        UserError: Every point costs more; the line says what to ask for.
    """
    cheapest = min(costs)
    if not cheapest <= limit:  # NaN is no budget
        percent = "" if whole is None else f" or {math.ceil(100 * cheapest / whole)}%"
        raise UserError(
            f"a budget of {limit:.4g}{unit} is too small here: the cheapest policy allowed needs "
            f"{cheapest:.4g}{unit}; ask for {_rounded_up(cheapest)}{unit}{percent}"
        )
    return [point for point, cost in zip(points, costs, strict=True) if cost <= limit]


def _rounded_up(value: float) -> str:
    """Return ``value`` with three digits, rounded up."""
    step = 10 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / step) * step:.6g}"
