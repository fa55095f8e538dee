"""Confidence that means something: a temperature for every exit (Guo et al., ICML 2017, arXiv 1706.04599), and the error that it mends.

temperatures = fit_temperatures(val_logits, val_targets)                          # of held-out images
calibration_errors(test_logits, test_targets, temperatures)                       # percent, of every exit
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_IMAGES = 10_000  # more hardly change a single number
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


def fit_temperatures(logits: Tensor, targets: Tensor) -> list[float]:
    """Temperatures of the least cross-entropy, from logits (K, N, C) and targets (N,)."""
    step = -(-len(targets) // MAX_IMAGES)
    return [_temperature(exit_logits[::step].double(), targets[::step]) for exit_logits in logits]


def _temperature(logits: Tensor, targets: Tensor) -> float:
    wanted = logits.gather(1, targets[:, None]).mean()
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    # The cross-entropy of softmax(inverse * logits) is convex in the inverse temperature; its slope is expected less wanted logit.
    for _ in range(25):
        inverse = (low * high) ** 0.5
        slope = (torch.softmax(inverse * logits, dim=1) * logits).sum(dim=1).mean() - wanted
        low, high = (inverse, high) if slope < 0 else (low, inverse)
    return round(1 / inverse, 4)


def calibration_errors(logits: Tensor, targets: Tensor, temperatures: Sequence[float] | None = None, bins: int = 15) -> list[float]:
    """Expected calibration error of every exit in percent: the mean distance between confidence and accuracy, over bins of confidence.

    Args:
        logits: (K, N, C).
        targets: (N,).
        temperatures: K numbers; None: 1 everywhere.
    """
    errors = []
    for k, exit_logits in enumerate(logits):
        confidence, classes = torch.softmax(exit_logits.float() / (temperatures[k] if temperatures else 1), dim=1).max(dim=1)
        bin_of = (confidence * bins).long().clamp(max=bins - 1)
        difference = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, (confidence - (classes == targets).float()).double())
        errors.append(100 * float(difference.abs().sum()) / len(targets))
    return errors
