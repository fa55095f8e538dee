"""Better answers from the same exits, without training: probabilities that mean something, and ensembles of all exits so far.

    temperatures = fit_temperatures(val_logits, val_targets)                      # of held-out images, one an exit
    weights = fit_ensemble(val_logits, val_targets, temperatures)                 # (K, K), None where no exit gains
    calibration_errors(test_logits, test_targets, temperatures)                   # percent, of every exit

A temperature (Guo et al., ICML 2017, arXiv 1706.04599) divides an exit's logits; an ensemble adds the logits of all exits so far, each with
a weight: a weighted geometric mean of their probabilities. Both minimise the cross-entropy on held-out images.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

MAX_IMAGES = 10_000  # more hardly change a few numbers
FOLDS = 5
PULL = 1e-4  # towards weights of 1: even where answers never err, the best weights are finite

Ensemble = tuple[tuple[float, ...], ...]  # weights, a row an exit


def fit_temperatures(logits: Tensor, targets: Tensor) -> list[float]:
    """Temperatures of every exit, from logits (K, N, C) and targets (N,)."""
    part = _part(targets)
    return [round(1 / float(_fit(exit_logits[None, part], targets[part])), 4) for exit_logits in logits]


def fit_ensemble(logits: Tensor, targets: Tensor, temperatures: Sequence[float]) -> Ensemble | None:
    """Weights (K, K) of the exits in the answers at each exit, from logits (K, N, C) and targets (N,).

    An exit answers with the others before it only if that is right more often on images that were left out of the fit, by more than a
    standard error; else alone, with its temperature. None: every exit had better answer alone.
    """
    rows = [
        [round(1 / temperature, 4) if j == k else 0.0 for j in range(len(logits))]
        for k, temperature in enumerate(temperatures)
    ]
    part = _part(targets)
    logits, targets = logits[:, part], targets[part]
    fold = torch.arange(len(targets)) % FOLDS
    gained = False
    for k in range(1, len(logits) if len(targets) >= FOLDS else 0):
        seen, together = logits[: k + 1], torch.empty_like(targets)
        for f in range(FOLDS):
            weights = _fit(seen[:, fold != f], targets[fold != f])
            together[fold == f] = torch.einsum("k,knc->nc", weights, seen[:, fold == f]).argmax(dim=1)
        gains = (together == targets).double() - (logits[k].argmax(dim=1) == targets).double()
        if gains.mean() > gains.std() / len(gains) ** 0.5:
            rows[k][: k + 1] = [round(weight, 4) for weight in _fit(seen, targets).tolist()]
            gained = True
    return tuple(map(tuple, rows)) if gained else None


def classes_together(logits: Tensor, ensemble: Ensemble | None) -> Tensor:
    """Classes (K, N) that an ensemble answers at every exit, from logits (K, N, C); None: each exit alone."""
    if ensemble is None:
        return logits.argmax(dim=2)
    return torch.stack(
        [torch.einsum("k,knc->nc", torch.tensor(weights), logits).argmax(dim=1) for weights in ensemble]
    )


def operations_together(operations: Sequence[int], num_classes: int) -> list[int]:
    """Operations to each exit where an ensemble answers, from those where each exit answers alone: the k-th adds k times the classes."""
    return [n + k * num_classes for k, n in enumerate(operations, start=1)]


def _part(targets: Tensor) -> slice:
    return slice(None, None, -(-len(targets) // MAX_IMAGES))


def _fit(logits: Tensor, targets: Tensor) -> Tensor:
    """Positive weights (k,) of logits (k, n, C) whose weighted sum has the least cross-entropy, (n,) targets."""
    logs = torch.zeros(len(logits), requires_grad=True)
    with torch.no_grad():
        logs[:-1] = -2.0  # the last exit is the best one
    optimizer = torch.optim.LBFGS([logs], max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            cross_entropy(torch.einsum("k,knc->nc", logs.exp(), logits), targets) + PULL * logs.square().sum()
        )
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return logs.detach().exp()


def calibration_errors(
    logits: Tensor, targets: Tensor, temperatures: Sequence[float] | None = None, bins: int = 15
) -> list[float]:
    """Expected calibration error of every exit, in percent with three digits: the mean distance between confidence and accuracy, over
    bins of confidence.

    Args:
        logits: (K, N, C).
        targets: (N,).
        temperatures: K numbers; None: 1 everywhere.
    """
    errors = []
    for k, exit_logits in enumerate(logits):
        confidence, classes = torch.softmax(
            exit_logits.float() / (temperatures[k] if temperatures else 1), dim=1
        ).max(dim=1)
        bin_of = (confidence * bins).long().clamp(max=bins - 1)
        difference = torch.zeros(bins, dtype=torch.float64).index_add_(
            0, bin_of, (confidence - (classes == targets).float()).double()
        )
        errors.append(round(100 * float(difference.abs().sum()) / len(targets), 3))
    return errors
