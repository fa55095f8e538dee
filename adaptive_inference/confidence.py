"""Class and confidence of an exit's prediction, from its logits, and the exit at which each image leaves.

Example:
    confidence, classes = confidence_by_exit(logits)     # logits (K, N, C) -> (K, N), (K, N)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Thresholds of exits at which no image, or every image, leaves; the released code's numbers.
NONE_LEAVE, ALL_LEAVE = 1e8, -1e8


class ExitPrediction(NamedTuple):
    """Prediction of one exit for n images: ``confidence`` (n,) and ``classes`` (n,) int64."""

    confidence: Tensor
    classes: Tensor


def _largest_probability(probs: Tensor, top: ExitPrediction, previous: ExitPrediction | None) -> Tensor:
    return top.confidence


def _negative_entropy(probs: Tensor, top: ExitPrediction, previous: ExitPrediction | None) -> Tensor:
    return 1 + torch.special.xlogy(probs, probs).sum(dim=1) / math.log(max(probs.shape[1], 2))


def _margin(probs: Tensor, top: ExitPrediction, previous: ExitPrediction | None) -> Tensor:
    second = probs.topk(min(2, probs.shape[1]), dim=1).values[:, 1:].sum(dim=1)  # 0 with one class
    return top.confidence - second


def _exits_in_agreement(probs: Tensor, top: ExitPrediction, previous: ExitPrediction | None) -> Tensor:
    ones = torch.ones_like(top.confidence)
    if previous is None:
        return ones
    return torch.where(top.classes == previous.classes, previous.confidence + 1, ones)


# Confidence functions by name. Each takes the probabilities (n, C), the largest one with its class, and the
# prediction of the previous exit, and returns the confidence (n,).
_CONFIDENCE_OF = {
    "softmax": _largest_probability,
    "entropy": _negative_entropy,
    "margin": _margin,
    "patience": _exits_in_agreement,
}
MEASURES = tuple(_CONFIDENCE_OF)


def next_prediction(measure: str, logits: Tensor, previous: ExitPrediction | None) -> ExitPrediction:
    """Return the class and the confidence of the next exit; higher is more confident.

    Args:
        measure: ``softmax``, the largest probability (the paper); ``entropy``, 1 - H(probabilities) / log C;
            ``margin``, the largest probability minus the second; ``patience``, the number of exits in a row,
            this one included, that predict the same class (Zhou et al., "BERT Loses Patience", NeurIPS 2020,
            arXiv 2006.04152).
        logits: (n, C).
        previous: Prediction of the previous exit for the same images, None at the first exit.

    Raises:
        ValueError: The measure is unknown.
    """
    if measure not in _CONFIDENCE_OF:
        raise ValueError(f"measure is {measure!r}; allowed: {', '.join(MEASURES)}")
    probs = torch.softmax(without_half_precision(logits), dim=1)
    largest, classes = probs.max(dim=1)
    confidence = _CONFIDENCE_OF[measure](probs, ExitPrediction(largest, classes), previous)
    return ExitPrediction(confidence, classes)


def without_half_precision(logits: Tensor) -> Tensor:
    """Return logits in float32 if they are in half precision, which would make many confidences equal."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def confidence_by_exit(logits: Tensor, measure: str = "softmax") -> tuple[Tensor, Tensor]:
    """Return confidence (K, N) and class (K, N), int64, of every exit, from logits (K, N, C)."""
    predictions, prediction = [], None
    for exit_logits in logits:
        prediction = next_prediction(measure, exit_logits, prediction)
        predictions.append(prediction)
    return torch.stack([p.confidence for p in predictions]), torch.stack([p.classes for p in predictions])


def reaches_threshold(confidence: Tensor, threshold: float | Tensor) -> Tensor:
    """Return which images leave at an exit, bool. An image whose confidence is NaN stays.

    ``ExitNetwork.early_exit`` and ``onnx_predictor`` have copies, as they import nothing of this package.
    """
    return confidence >= threshold


def assign_exits(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """Return the exit (0-based) at which each image leaves.

    Args:
        confidence: (K, N).
        thresholds: (K,).

    Returns:
        (N,), int64.
    """
    last = len(confidence) - 1
    exits = torch.full(confidence.shape[1:], last, device=confidence.device)
    for k in reversed(range(last)):
        exits.masked_fill_(reaches_threshold(confidence[k], thresholds[k]), k)
    return exits
