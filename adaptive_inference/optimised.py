"""Optimised thresholds: the highest held-out accuracy within a budget.

Example:
    thresholds = optimised_thresholds(val, operations)                 # (40, K), as from geometric_thresholds

For each cost per operation, lambda, the thresholds maximise

    sum over images of ([the exit k at which the image leaves is right] - lambda * operations_k)

With all other thresholds fixed, one sort finds the best threshold of exit k. For every image that reaches k,
leaving there instead of continuing changes the sum by a known amount: sort the images by falling confidence,
and cut where the cumulative change is largest. One sweep over the exits, from the last to the first, starts
from the thresholds of the geometric rule that are best at that lambda; more sweeps gain nothing that lasts.
Budgets between those of neighbouring lambdas are reached by interpolation.

Two measures limit overfitting to the held-out images: cuts lie on a grid of quantiles, and every threshold is
the mean, in quantiles, of fits that each leave out one part of the images.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptive_inference.budgeted import ExitPredictions, geometric_thresholds
from adaptive_inference.confidence import ALL_LEAVE, NONE_LEAVE, reaches_threshold

GRID = 100  # cuts per exit
NUM_SPLITS = 5  # of the cross-validation
NUM_LAMBDAS = 40
# Weight of images that left before an exit, so that an exit that no image reaches still gets a sensible
# threshold. At 0.02, 50 of them weigh as much as one image that reaches the exit: they decide only where
# hardly any image does.
DEPARTED_WEIGHT = 0.02


def optimised_thresholds(val: ExitPredictions, operations: Sequence[float], num_points: int = 40) -> Tensor:
    """Return thresholds for the budgets that the geometric rule spends on the same images.

    Args:
        val: Predictions for the held-out images.
        operations: Operations to each exit, K numbers.
        num_points: Number of budgets.

    Returns:
        (num_points, K), dtype of the confidence.
    """
    num_exits, num_images = val.confidence.shape
    geometric = geometric_thresholds(val.confidence, num_points)
    if num_exits == 1 or num_images < 4 * NUM_SPLITS:  # nothing to choose, or too little to choose by
        return geometric
    problem = _Problem(val, operations)
    start = problem.to_quantiles(geometric)
    # Split by position of the image: deterministic, and the order of held-out images does not matter.
    split = torch.arange(num_images) % NUM_SPLITS
    fits = [problem.optimise(split != left_out, start) for left_out in range(NUM_SPLITS)]
    return problem.thresholds(problem.curve(torch.stack(fits).mean(dim=0), problem.result(start)[1]))


class _Problem:
    """Thresholds as cuts (..., K - 1): the share of all held-out images that are at least as confident.

    Args:
        predictions: Predictions for the held-out images.
        operations: Operations to each exit.
    """

    def __init__(self, predictions: ExitPredictions, operations: Sequence[float]):
        self.confidence = confidence = predictions.confidence
        self.correct = predictions.correct.float()
        # As shares of the full network: lambda is then the accuracy that it must be worth.
        self.cost = torch.tensor(list(operations), dtype=torch.float32) / operations[-1]
        self.descending = confidence[:-1].sort(dim=1, descending=True).values
        num_images = confidence.shape[1]
        # Images leave at exit k if grid_index[k] < cut. Equal confidences share a cell.
        ranks = (torch.arange(1, GRID + 1) * num_images // GRID - 1).clamp(min=0)
        grid = self.descending[:, ranks]
        self.grid_index = torch.searchsorted(-grid, -confidence[:-1].contiguous())

    def to_quantiles(self, thresholds: Tensor) -> Tensor:
        """Return the cuts (P, K - 1) of thresholds (P, K)."""
        num_images = self.confidence.shape[1]
        at_least = torch.searchsorted(-self.descending, -thresholds[:, :-1].T.contiguous(), right=True)
        return at_least.T.float() / num_images

    def thresholds(self, cuts: Tensor) -> Tensor:
        """Return the thresholds (P, K) of cuts (P, K - 1)."""
        num_images = self.confidence.shape[1]
        ranks = (cuts * num_images).round().long()
        values = self.descending.gather(1, (ranks.T - 1).clamp(min=0)).T
        last = torch.full((len(cuts), 1), ALL_LEAVE, dtype=self.confidence.dtype)
        return torch.cat([torch.where(ranks > 0, values, NONE_LEAVE), last], dim=1)

    def result(self, cuts: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return accuracy and mean cost (P,) of the chosen images (all if None) with cuts (P, K - 1)."""
        images = slice(None) if chosen is None else chosen
        thresholds = self.thresholds(cuts)
        confidence, correct = self.confidence[:, images], self.correct[:, images]
        # Start as if all images ran to the last exit, and let them leave at earlier ones.
        right = correct[-1].expand(len(cuts), -1)  # (P, n)
        cost = self.cost[-1].expand(len(cuts), correct.shape[1])  # (P, n)
        for k in range(len(confidence) - 2, -1, -1):
            leaves = reaches_threshold(confidence[k], thresholds[:, k : k + 1])
            right = torch.where(leaves, correct[k], right)
            cost = torch.where(leaves, self.cost[k], cost)
        return right.mean(dim=1), cost.mean(dim=1)

    def optimise(self, chosen: Tensor, start: Tensor) -> Tensor:
        """Return the best cuts (L, K - 1) for the chosen images, from expensive to cheap operations.

        K is the number of exits, L = ``NUM_LAMBDAS`` that of the costs per operation (lambda), and n that of
        the chosen images.

        Args:
            chosen: Which images count, (N,) bool.
            start: Cuts (P, K - 1); the best of them at each lambda are improved.
        """
        index = self.grid_index[:, chosen]  # (K - 1, n)
        correct = self.correct[:, chosen]  # (K, n)
        lambdas = torch.logspace(1, -3.5, NUM_LAMBDAS)
        reward = correct[:, None] - lambdas[:, None] * self.cost[:, None, None]  # (K, L, n)
        cuts = (self._best_of(start, lambdas, chosen) * GRID).round()  # (L, K - 1), in cells of the grid
        reaches = _reached_exits(index, cuts)  # (K - 1, L, n)
        reward_later = reward[-1]  # (L, n), of an image that continues after exit k
        for k in reversed(range(len(index))):
            weight = torch.where(reaches[k], 1.0, DEPARTED_WEIGHT)
            change = weight * (reward[k] - reward_later)  # (L, n), if an image leaves here
            cell = torch.nn.functional.one_hot(index[k], GRID + 1)[:, :GRID].float()  # (n, GRID)
            total = (change @ cell).cumsum(dim=1)  # (L, GRID), over the cells up to each cut
            # The cut 0, at which no image leaves, changes nothing.
            cuts[:, k] = torch.nn.functional.pad(total, (1, 0)).argmax(dim=1)
            reward_later = torch.where(index[k] < cuts[:, k : k + 1], reward[k], reward_later)
        return cuts / GRID

    def _best_of(self, start: Tensor, lambdas: Tensor, chosen: Tensor) -> Tensor:
        """Return for each lambda (L,) the best of the cuts (P, K - 1), for the chosen images: (L, K - 1)."""
        accuracy, cost = self.result(start, chosen)  # (P,)
        return start[(accuracy - lambdas[:, None] * cost).argmax(dim=1)]

    def curve(self, fit: Tensor, wanted: Tensor) -> Tensor:
        """Return cuts (P, K - 1) that cost ``wanted`` (P,).

        Args:
            fit: (L, K - 1), the best cuts at each lambda; neighbours are joined by straight lines.
            wanted: Mean cost of each policy.
        """
        # Position t = i + fraction lies between fits i and i + 1.
        low, high = torch.zeros(len(wanted)), torch.full((len(wanted),), len(fit) - 1.0)
        for _ in range(20):
            middle = (low + high) / 2
            affordable = self.result(_between(fit, middle))[1] <= wanted
            low, high = torch.where(affordable, middle, low), torch.where(affordable, high, middle)
        return _between(fit, low)


def _reached_exits(index: Tensor, cuts: Tensor) -> list[Tensor]:
    """Return for each exit but the last which images reach it, bool (L, n).

    Args:
        index: Cell of the grid of each image at each exit, (K - 1, n).
        cuts: (L, K - 1), in cells.
    """
    reaches = [torch.ones(len(cuts), index.shape[1], dtype=torch.bool)]
    for k in range(len(index) - 1):
        reaches.append(reaches[k] & (index[k] >= cuts[:, k : k + 1]))
    return reaches


def _between(fit: Tensor, position: Tensor) -> Tensor:
    below = position.long().clamp(max=len(fit) - 2)
    fraction = (position - below)[:, None]
    return (1 - fraction) * fit[below] + fraction * fit[below + 1]
