"""Budgeted batch prediction: one budget for a set of images (MSDNet paper, sections 3 and 5).

Example:
    val = ExitPredictions.from_logits(val_logits, val_targets)           # held-out images
    thresholds = geometric_thresholds(val.confidence)                    # (40, K), from cheap to full
    result = evaluate_thresholds(thresholds[19], test, count_operations(network, 32))
    result.acc1, result.operations

An image leaves at the first exit whose confidence, the largest softmax probability, reaches that exit's
threshold. The thresholds are set on held-out images so that a wanted share leaves at every exit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adaptive_inference.confidence import ALL_LEAVE, NONE_LEAVE, assign_exits, confidence_by_exit


class ExitPredictions(NamedTuple):
    """Predictions of every exit for N images with labels.

    Attributes:
        confidence: (K, N), as from ``confidence_by_exit``.
        classes: (K, N), int64.
        targets: (N,), int64.
    """

    confidence: Tensor
    classes: Tensor
    targets: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor, targets: Tensor, measure: str = "softmax") -> "ExitPredictions":
        """Return the predictions of logits (K, N, C) for images with targets (N,)."""
        return cls(*confidence_by_exit(logits, measure), targets)

    @property
    def correct(self) -> Tensor:
        """Whether each exit predicts the right class, (K, N) bool."""
        return self.classes == self.targets

    def subset(self, images: Tensor) -> "ExitPredictions":
        """Return the predictions for these images: a mask (N,) or indices."""
        return ExitPredictions(*(values[..., images] for values in self))


class BudgetedResult(NamedTuple):
    """Result of a set of thresholds on a set of images.

    Attributes:
        acc1: Top-1 accuracy in percent.
        operations: Mean operations per image.
        shares: K shares of the images, by the exit at which they leave.
    """

    acc1: float
    operations: float
    shares: tuple[float, ...]


def exit_shares(ratio: float, num_exits: int) -> Tensor:
    """Return the share of the images that should leave at each exit: q_k proportional to ratio^k, k = 1 .. K.

    Single precision and the logarithm as in the released code: floor(N q_k) depends on the rounding.

    Returns:
        (K,), float32, with sum 1.
    """
    q = torch.exp(torch.tensor(ratio, dtype=torch.float32).log() * torch.arange(1, num_exits + 1))
    return q / q.sum()


def geometric_thresholds(confidence: Tensor, num_points: int = 40) -> Tensor:
    """Return the paper's thresholds: at budget i, shares of about ``exit_shares(2 i / num_points)`` leave.

    Exit by exit, among the images that have not left, the threshold is the confidence of the floor(N q_k)-th
    most confident one. Where that number is 0, or more than are left, none leave. The last exit takes
    everything.

    Args:
        confidence: (K, N) of the held-out images.
        num_points: Number of budgets.

    Returns:
        (num_points, K), from cheap to full, in the dtype of ``confidence``.
    """
    num_exits, num_images = confidence.shape
    order = confidence.argsort(dim=1, descending=True)
    thresholds = confidence.new_full((num_points, num_exits), NONE_LEAVE)
    thresholds[:, -1] = ALL_LEAVE
    for number, row in enumerate(thresholds, start=1):
        shares = exit_shares(2 * number / num_points, num_exits)
        present = torch.ones(num_images, dtype=torch.bool, device=confidence.device)
        for k in range(num_exits - 1):
            wanted = int((num_images * shares[k]).floor())
            by_confidence = order[k][present[order[k]]]
            if 0 < wanted <= len(by_confidence):
                row[k] = confidence[k, by_confidence[wanted - 1]]
                present &= confidence[k] < row[k]
    return thresholds


def evaluate_thresholds(
    thresholds: Tensor, predictions: ExitPredictions, operations: Sequence[float]
) -> BudgetedResult:
    """Return what thresholds (K,) reach on a set of images; ``operations`` are K numbers, to each exit."""
    exits = assign_exits(predictions.confidence, thresholds)
    counts = torch.bincount(exits, minlength=len(operations))
    num_correct = predictions.correct.gather(0, exits[None]).sum().item()
    cost = sum(count * to_exit for count, to_exit in zip(counts.tolist(), operations, strict=True))
    count = len(exits)
    return BudgetedResult(100 * num_correct / count, cost / count, tuple((counts / count).tolist()))
