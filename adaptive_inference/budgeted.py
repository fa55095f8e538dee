"""Budgeted batch prediction: one budget for a whole set of images, spent on those that need it (MSDNet paper, section 3 and 5).

    rows = budgeted_curve(val_probs, val_targets, test_probs, test_targets, count_operations(network, 32))
    rows[19]["test_acc1"], rows[19]["operations"]

An image leaves at the first exit whose confidence, the largest softmax probability, reaches that exit's threshold. The thresholds are
set on held-out images so that a wanted share leaves at every exit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Thresholds of exits at which no image, or every image, leaves; the released program's numbers.
NONE_LEAVE, ALL_LEAVE = 1e8, -1e8


def exit_shares(ratio: float, num_exits: int) -> Tensor:
    """Share of the images that should leave at each exit: q_k proportional to ratio^k, k = 1 .. K. Returns (K,), float32, sum 1.

    Single precision and the logarithm as in the released program: floor(N q_k) depends on the rounding.
    """
    q = torch.exp(torch.tensor(ratio, dtype=torch.float32).log() * torch.arange(1, num_exits + 1))
    return q / q.sum()


def geometric_thresholds(confidence: Tensor, shares: Tensor) -> Tensor:
    """Thresholds that let about ``shares`` of the images leave at each exit.

    Exit by exit, among the images not yet gone, the threshold is the confidence of the floor(N q_k)-th most confident one. Where that
    number is 0, or more than are left, none leave. The last exit takes everything.

    Args:
        confidence: (K, N) of the held-out images.
        shares: (K,) as ``exit_shares`` gives.

    Returns:
        (K,), dtype of ``confidence``.
    """
    return _thresholds(confidence, shares, confidence.argsort(dim=1, descending=True))


def _thresholds(confidence: Tensor, shares: Tensor, order: Tensor) -> Tensor:
    """As ``geometric_thresholds``; ``order`` (K, N) sorts each exit's confidence, most confident first."""
    num_exits, num_images = confidence.shape
    thresholds = confidence.new_full((num_exits,), NONE_LEAVE)
    thresholds[-1] = ALL_LEAVE
    present = torch.ones(num_images, dtype=torch.bool, device=confidence.device)
    for k in range(num_exits - 1):
        wanted = int((num_images * shares[k]).floor())
        by_confidence = order[k][present[order[k]]]
        if 0 < wanted <= len(by_confidence):
            thresholds[k] = confidence[k, by_confidence[wanted - 1]]
            present &= confidence[k] < thresholds[k]
    return thresholds


def assign_exits(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """Exit (0-based) at which each image leaves: confidence (K, N), thresholds (K,) -> (N,), int64."""
    last = len(confidence) - 1
    exits = torch.full(confidence.shape[1:], last, device=confidence.device)
    for k in reversed(range(last)):
        exits.masked_fill_(confidence[k] >= thresholds[k], k)
    return exits


def budgeted_result(correct: Tensor, exits: Tensor, operations: Sequence[float]) -> tuple[float, float]:
    """Accuracy in percent and mean operations of images that leave at ``exits``.

    Args:
        correct: (K, N), whether each exit classifies each image correctly.
        exits: (N,), 0-based.
        operations: to each exit, K numbers.
    """
    num_correct = correct.gather(0, exits[None]).sum().item()
    counts = torch.bincount(exits, minlength=len(operations)).tolist()
    cost = sum(count * to_exit for count, to_exit in zip(counts, operations, strict=True))
    return 100 * num_correct / len(exits), cost / len(exits)


def confidence_and_correctness(probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (K, N, C), class indices (N,) -> largest probability (K, N), and whether its class is right (K, N)."""
    # One exit at a time: the temporary results stay a fraction of one exit's probabilities.
    confidence, predicted = zip(*(exit_probs.max(dim=1) for exit_probs in probs), strict=True)
    return torch.stack(confidence), torch.stack(predicted) == targets


def budgeted_curve(
    val_probs: Tensor,
    val_targets: Tensor,
    test_probs: Tensor,
    test_targets: Tensor,
    operations: Sequence[float],
    points: int = 40,
) -> list[dict]:
    """Accuracy against mean operations for ``points`` budgets, from cheap to full.

    Args:
        val_probs, test_probs: softmax outputs of every exit on held-out and test images, (K, N, C) each.
        val_targets, test_targets: class indices, (N,) each.
        operations: to each exit, K numbers.
        points: budgets p = 1 .. points; images leave in shares proportional to (2 p / points)^k, that is (p / 20)^k for 40.

    Returns:
        One dict a budget: ``p``, ``q`` (wanted shares), ``thresholds``, ``val_acc1`` and ``test_acc1`` (percent), ``val_operations``
        and ``operations`` (their means on held-out and test images), ``val_shares`` and ``shares`` (of the images that leave at each exit).

    Raises:
        ValueError: shapes that do not belong together.
    """
    checked = checked_confidences(val_probs, val_targets, test_probs, test_targets, operations)
    return budget_points(*checked, operations, points)


def checked_confidences(
    val_probs: Tensor, val_targets: Tensor, test_probs: Tensor, test_targets: Tensor, operations: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Confidence and correctness (K, N) of the held-out images, then of the test images.

    Raises:
        ValueError: shapes that do not belong together.
    """
    results = []
    for name, probs, targets in (("val", val_probs, val_targets), ("test", test_probs, test_targets)):
        if probs.dim() != 3 or targets.shape != probs.shape[1:2] or probs.shape[0] != len(operations) or probs.shape[1] == 0:
            raise ValueError(
                f"{name}_probs {tuple(probs.shape)} must be (exits, images, classes), with one target an image (given: "
                f"{tuple(targets.shape)}) and one operation count an exit (given: {len(operations)})"
            )
        results += confidence_and_correctness(probs, targets)
    return tuple(results)


def budget_points(
    val_confidence: Tensor,
    val_correct: Tensor,
    test_confidence: Tensor,
    test_correct: Tensor,
    operations: Sequence[float],
    points: int = 40,
) -> list[dict]:
    """The rows of ``budgeted_curve``, from confidence and correctness (K, N) of every exit."""
    order = val_confidence.argsort(dim=1, descending=True)
    rows = []
    for p in range(1, points + 1):
        shares = exit_shares(2 * p / points, len(operations))
        thresholds = _thresholds(val_confidence, shares, order)
        accuracies = accuracies_and_costs(thresholds, (val_confidence, val_correct), (test_confidence, test_correct), operations)
        rows.append({"p": p, "q": shares.tolist(), **accuracies})
    return rows


def accuracies_and_costs(
    thresholds: Tensor, val: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], operations: Sequence[float]
) -> dict[str, list[float] | float]:
    """``thresholds`` (K,) and what they reach: those entries of a row of ``budgeted_curve``. ``val`` and ``test`` are confidence and
    correctness (K, N) each."""
    row: dict[str, list[float] | float] = {"thresholds": thresholds.tolist()}
    for names, (confidence, correct) in (
        (("val_acc1", "val_operations", "val_shares"), val),
        (("test_acc1", "operations", "shares"), test),
    ):
        exits = assign_exits(confidence, thresholds)
        shares = (torch.bincount(exits, minlength=len(operations)) / len(exits)).tolist()
        row |= zip(names, (*budgeted_result(correct, exits, operations), shares), strict=True)
    return row
