"""From thresholds to points: results of policies on held-out images, with or without the ensemble of exits.

Example:
    predictions, costs = with_ensemble(predictions, logits, policy, operations)
    points = evaluate_points("ensemble", thresholds, policy, predictions, costs)
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from adaptive_inference.budgeted import ExitPredictions, evaluate_thresholds
from adaptive_inference.calibration import ensemble_classes, ensemble_operations
from adaptive_inference.policies import Point, Policy


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


def with_ensemble(
    predictions: ExitPredictions, logits: Tensor, policy: Policy, operations: Sequence[float]
) -> tuple[ExitPredictions, Sequence[float]]:
    """Return the predictions of the policy's ensemble at every exit, and the operations to them.

    Args:
        predictions: Predictions of each exit alone.
        logits: (K, N, C).
        policy: The policy; if it has no ensemble, predictions and operations are returned unchanged.
        operations: Operations to each exit.
    """
    if policy.ensemble is None:
        return predictions, operations
    ensemble_predictions = predictions._replace(classes=ensemble_classes(logits, policy.ensemble))
    return ensemble_predictions, ensemble_operations(operations, logits.shape[2])
