"""Budgeted batch prediction: one budget for a whole set of images, spent on those that need it (MSDNet paper, section 3 and 5).

    val, test = (ExitAnswers(*confidence_by_exit(logits), targets) for logits, targets in (held_out, new))
    rows = curve_rows(geometric_thresholds(val.confidence), val, test, count_operations(network, 32))
    rows[19]["test_acc1"], rows[19]["operations"]

An image leaves at the first exit whose confidence, the largest softmax probability, reaches that exit's threshold. The thresholds are
set on held-out images so that a wanted share leaves at every exit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Thresholds of exits at which no image, or every image, leaves; the released program's numbers.
NONE_LEAVE, ALL_LEAVE = 1e8, -1e8


class ExitAnswers(NamedTuple):
    """What every exit says of N images, ``confidence`` and ``classes`` (K, N) as ``policies.confidence_by_exit`` gives them, and what they
    show, ``targets`` (N,)."""

    confidence: Tensor
    classes: Tensor
    targets: Tensor

    @property
    def correct(self) -> Tensor:
        """Whether an exit's class is right, (K, N)."""
        return self.classes == self.targets

    def of(self, images: Tensor) -> "ExitAnswers":
        """The answers to these images: a mask (N,) or indices."""
        return ExitAnswers(*(values[..., images] for values in self))


def exit_shares(ratio: float, num_exits: int) -> Tensor:
    """Share of the images that should leave at each exit: q_k proportional to ratio^k, k = 1 .. K. Returns (K,), float32, sum 1.

    Single precision and the logarithm as in the released program: floor(N q_k) depends on the rounding.
    """
    q = torch.exp(torch.tensor(ratio, dtype=torch.float32).log() * torch.arange(1, num_exits + 1))
    return q / q.sum()


def geometric_thresholds(confidence: Tensor, points: int = 40) -> Tensor:
    """Thresholds for ``points`` budgets, from cheap to full: budget p lets shares of about ``exit_shares(2 p / points)`` leave.

    Exit by exit, among the images not yet gone, the threshold is the confidence of the floor(N q_k)-th most confident one. Where that
    number is 0, or more than are left, none leave. The last exit takes everything.

    Args:
        confidence: (K, N) of the held-out images.

    Returns:
        (points, K), dtype of ``confidence``.
    """
    num_exits, num_images = confidence.shape
    order = confidence.argsort(dim=1, descending=True)
    thresholds = confidence.new_full((points, num_exits), NONE_LEAVE)
    thresholds[:, -1] = ALL_LEAVE
    for p, own in enumerate(thresholds, start=1):
        shares = exit_shares(2 * p / points, num_exits)
        present = torch.ones(num_images, dtype=torch.bool, device=confidence.device)
        for k in range(num_exits - 1):
            wanted = int((num_images * shares[k]).floor())
            by_confidence = order[k][present[order[k]]]
            if 0 < wanted <= len(by_confidence):
                own[k] = confidence[k, by_confidence[wanted - 1]]
                present &= confidence[k] < own[k]
    return thresholds


def assign_exits(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """Exit (0-based) at which each image leaves: confidence (K, N), thresholds (K,) -> (N,), int64."""
    last = len(confidence) - 1
    exits = torch.full(confidence.shape[1:], last, device=confidence.device)
    for k in reversed(range(last)):
        exits.masked_fill_(confidence[k] >= thresholds[k], k)
    return exits


def curve_rows(
    thresholds: Tensor, val: ExitAnswers, test: ExitAnswers, operations: Sequence[float]
) -> list[dict]:
    """What thresholds (P, K), of P policies, reach on held-out and on test images.

    Args:
        operations: to each exit, K numbers.

    Returns:
        One dict a policy: its number ``p`` from 1, ``thresholds``, ``val_acc1`` and ``test_acc1`` (percent), ``val_operations`` and
        ``operations`` (means), ``val_shares`` and ``shares`` (of the images that leave at each exit).
    """
    rows = []
    for p, own in enumerate(thresholds, start=1):
        row = {"p": p, "thresholds": own.tolist()}
        for names, answers in (
            (("val_acc1", "val_operations", "val_shares"), val),
            (("test_acc1", "operations", "shares"), test),
        ):
            exits = assign_exits(answers.confidence, own)
            counts = torch.bincount(exits, minlength=len(operations))
            num_correct = answers.correct.gather(0, exits[None]).sum().item()
            cost = sum(count * to_exit for count, to_exit in zip(counts.tolist(), operations, strict=True))
            row |= zip(
                names,
                (100 * num_correct / len(exits), cost / len(exits), (counts / len(exits)).tolist()),
                strict=True,
            )
        rows.append(row)
    return rows
