"""Better predictions from the same exits, without training: calibrated probabilities, and ensembles of exits.

Example:
    temperatures = fit_temperatures(val_logits, val_targets)          # on held-out images, one per exit
    weights = fit_ensemble(val_logits, val_targets, temperatures)     # (K, K), None where no exit gains
    calibration_errors(test_logits, test_targets, temperatures)       # percent, of every exit

A temperature (Guo et al., ICML 2017, arXiv 1706.04599) divides an exit's logits; an ensemble adds the logits
of all exits so far, each with a weight: a weighted geometric mean of their probabilities. Both minimise the
cross-entropy on held-out images plus a penalty, which counts as much as a few dozen images do: with few
images temperatures stay near 1 and weights near those of the exit alone, with many it makes no difference.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adaptive_inference.budgeted import ExitPredictions

MAX_IMAGES = 10_000  # more hardly change a few numbers
MANY_IMAGES = 1_000  # with fewer, no temperature is below 1: that would make confidences larger
TEMPERATURE_SPREAD = 0.25  # standard deviation of the log of a temperature, before any image is seen
LARGEST_TEMPERATURE = 10.0
WEIGHT_SPREAD = 0.3  # standard deviation of a weight around that of the exit alone, before any image is seen
LARGEST_WEIGHT = 4.0
NUM_SPLITS = 5  # of the cross-validation
NEEDED_GAIN = 2.0  # standard errors by which an ensemble must be right more often than the exit alone

Ensemble = tuple[tuple[float, ...], ...]  # weights, one row per exit


def fit_temperatures(logits: Tensor, targets: Tensor) -> list[float]:
    """Return a temperature for every exit, from 1 / ``LARGEST_TEMPERATURE`` to ``LARGEST_TEMPERATURE``.

    Args:
        logits: (K, N, C) of held-out images.
        targets: (N,).
    """
    sample = _sample(targets)
    temperatures = [_fit_temperature(exit_logits[sample], targets[sample]) for exit_logits in logits]
    lowest = 1.0 if len(targets) < MANY_IMAGES else 0.0
    return [round(max(temperature, lowest), 3) for temperature in temperatures]


def _fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Find the minimum by bisection, on the log of the inverse temperature."""
    target_logits = logits.gather(1, targets[:, None])[:, 0]
    low, high = -math.log(LARGEST_TEMPERATURE), math.log(LARGEST_TEMPERATURE)
    for _ in range(14):
        middle = (low + high) / 2
        factor = math.exp(middle)
        expected = (torch.softmax(factor * logits, dim=1) * logits).sum(dim=1)
        slope = factor * float((expected - target_logits).double().sum()) + middle / TEMPERATURE_SPREAD**2
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def fit_ensemble(logits: Tensor, targets: Tensor, temperatures: Sequence[float]) -> Ensemble | None:
    """Return weights (K, K) of the exits in the prediction at each exit.

    An exit predicts with the previous ones only if that is right more often on images that were left out
    of the fit, by at least ``NEEDED_GAIN`` standard errors; else alone, with its temperature.

    Args:
        logits: (K, N, C) of held-out images.
        targets: (N,).
        temperatures: Temperature of every exit.

    Returns:
        The weights; None if every exit shall predict alone.
    """
    num_exits = len(logits)
    rows = [_alone(k, temperatures, num_exits).tolist() for k in range(num_exits)]
    sample = _sample(targets)
    logits, targets = logits[:, sample], targets[sample]
    gained = False
    for k in range(1, num_exits if len(targets) >= NUM_SPLITS else 0):
        start = _alone(k, temperatures, k + 1)
        if _gains(logits[: k + 1], targets, start):
            rows[k][: k + 1] = _fit_weights(logits[: k + 1], targets, start).tolist()
            gained = True
    return tuple(tuple(round(weight, 4) for weight in row) for row in rows) if gained else None


def _alone(k: int, temperatures: Sequence[float], count: int) -> Tensor:
    weights = torch.zeros(count, dtype=torch.float64)
    weights[k] = 1 / temperatures[k]
    return weights


def _gains(logits: Tensor, targets: Tensor, start: Tensor) -> bool:
    """Return whether an ensemble beats the last of these exits on images left out of its fit."""
    split = torch.arange(len(targets)) % NUM_SPLITS
    together = torch.empty_like(targets)
    for number in range(NUM_SPLITS):
        is_left_out = split == number
        weights = _fit_weights(logits[:, ~is_left_out], targets[~is_left_out], start)
        together[is_left_out] = _weighted(weights, logits[:, is_left_out]).argmax(dim=1)
    gains = (together == targets).double() - (logits[-1].argmax(dim=1) == targets).double()
    # As in McNemar's test: if neither predicts better, each of the images on which they differ is a gain or a
    # loss with equal probability. The standard deviation of a few gains alone would be far too small.
    standard_error = gains.abs().sum().sqrt()
    return bool(gains.sum() > 0 and gains.sum() >= NEEDED_GAIN * standard_error)


def _fit_weights(logits: Tensor, targets: Tensor, start: Tensor) -> Tensor:
    """Return the best weights, by Newton's method: the cross-entropy is convex in them.

    Args:
        logits: (k, n, C).
        targets: (n,).
        start: Weights (k,) of the last exit alone, towards which the penalty pulls.

    Returns:
        (k,), from 0 to ``LARGEST_WEIGHT``, rounded so that the rounding of logits hardly changes them.
    """
    target_logits = logits.gather(2, targets.expand(len(logits), -1)[..., None])[..., 0]  # (k, n)
    weights, loss = start, _penalised(start, logits, targets, start)
    for _ in range(30):
        step = _newton_step(weights, logits, target_logits, start)
        better = _line_search(weights, step, loss, lambda tried: _penalised(tried, logits, targets, start))
        if better is None:
            break
        change = float((better[0] - weights).abs().max())
        weights, loss = better
        if change < 1e-5:
            break
    return (weights * 100).round() / 100


def _line_search(
    weights: Tensor, step: Tensor, loss: float, loss_of: Callable[[Tensor], float]
) -> tuple[Tensor, float] | None:
    """Return weights of a smaller loss, and that loss: the step is halved until there is one, or None."""
    for halvings in range(12):
        tried = (weights + step / 2**halvings).clamp(0, LARGEST_WEIGHT)
        if (tried_loss := loss_of(tried)) < loss:
            return tried, tried_loss
    return None


def _newton_step(weights: Tensor, logits: Tensor, target_logits: Tensor, start: Tensor) -> Tensor:
    """Return the step of the weights; those at a limit that would leave it stay."""
    probs = torch.softmax(_weighted(weights, logits), dim=1)  # (n, C)
    mean = (probs * logits).sum(dim=2)  # (k, n)
    slope = (mean - target_logits).double().sum(dim=1) + (weights - start) / WEIGHT_SPREAD**2
    second = (probs * logits).flatten(1) @ logits.flatten(1).T - mean @ mean.T
    curvature = second.double() + torch.eye(len(weights)).double() / WEIGHT_SPREAD**2
    free = ((weights > 0) | (slope < 0)) & ((weights < LARGEST_WEIGHT) | (slope > 0))
    step = torch.zeros_like(weights)
    if free.any():
        step[free] = torch.linalg.solve(curvature[free][:, free], -slope[free])
    return step


def _penalised(weights: Tensor, logits: Tensor, targets: Tensor, start: Tensor) -> float:
    loss = cross_entropy(_weighted(weights, logits).double(), targets, reduction="sum")
    return float(loss) + float(((weights - start) ** 2).sum()) / (2 * WEIGHT_SPREAD**2)


def _weighted(weights: Tensor, logits: Tensor) -> Tensor:
    return torch.einsum("k,knc->nc", weights.to(logits.dtype), logits)


def ensemble_classes(logits: Tensor, ensemble: Ensemble | None) -> Tensor:
    """Return the classes (K, N) that an ensemble predicts at every exit.

    Args:
        logits: (K, N, C).
        ensemble: If None, each exit alone.
    """
    if ensemble is None:
        return logits.argmax(dim=2)
    return torch.stack([_weighted(torch.tensor(weights), logits).argmax(dim=1) for weights in ensemble])


def ensemble_operations(operations: Sequence[int], num_classes: int) -> list[int]:
    """Return the operations to each exit with an ensemble: the k-th adds k times the number of classes."""
    return [n + k * num_classes for k, n in enumerate(operations, start=1)]


def with_ensemble(
    predictions: ExitPredictions, logits: Tensor, ensemble: Ensemble | None, operations: Sequence[float]
) -> tuple[ExitPredictions, Sequence[float]]:
    """Return the predictions of an ensemble at every exit, and the operations to them.

    Args:
        predictions: Predictions of each exit alone.
        logits: (K, N, C).
        ensemble: Weights, K rows of K; None returns predictions and operations unchanged.
        operations: Operations to each exit.
    """
    if ensemble is None:
        return predictions, operations
    ensemble_predictions = predictions._replace(classes=ensemble_classes(logits, ensemble))
    return ensemble_predictions, ensemble_operations(operations, logits.shape[2])


def _sample(targets: Tensor) -> slice:
    """Return a slice of at most ``MAX_IMAGES`` images, equally spaced."""
    return slice(None, None, -(-len(targets) // MAX_IMAGES))


def calibration_errors(
    logits: Tensor, targets: Tensor, temperatures: Sequence[float] | None = None, bins: int = 15
) -> list[float]:
    """Return the expected calibration error of every exit, in percent with three digits.

    It is the mean distance between confidence and accuracy, over bins of confidence.

    Args:
        logits: (K, N, C).
        targets: (N,).
        temperatures: K numbers. If None, 1 everywhere.
        bins: Number of bins of equal width.
    """
    errors = []
    for k, exit_logits in enumerate(logits):
        probs = torch.softmax(exit_logits.float() / (temperatures[k] if temperatures else 1), dim=1)
        confidence, classes = probs.max(dim=1)
        bin_of = (confidence * bins).long().clamp(max=bins - 1)
        gaps = (confidence - (classes == targets).float()).double()
        difference = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, gaps)
        errors.append(round(100 * float(difference.abs().sum()) / len(targets), 3))
    return errors
