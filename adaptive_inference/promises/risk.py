"""Promises about accuracy: policies that lose at most so much against the full network, with a level of confidence.

    rows = rows_with_losses(answers, operations)     # to held-out images; kept in policy.json
    points = certified(curve.points, MaxLoss(1.0, level=95.0))       # or choose(curve, max_loss=MaxLoss(1.0))

"Learn then Test" (Angelopoulos et al. 2021, arXiv 2110.01052; for early exit Jazbec et al., NeurIPS 2024, arXiv 2405.20915): some held-out
images set the thresholds of a curve of policies, the others test these one after another, from dear to cheap, up to the first one that may
lose too much. A sequence fixed beforehand needs no correction for many tests. A loss is 1 for an image on which the policy is wrong and the
full network right, -1 the other way round, 0 otherwise (or 1 for every image with another answer). That its mean exceeds a limit is
rejected by betting against it (Waudby-Smith and Ramdas 2024, arXiv 2010.09686): were it so, the wealth of no such bettor would be likely to
grow large. The stake is set by the images that set the thresholds, so that the order of the others does not matter.

Promised is that P(mean loss on new images > limit) is at most 1 - level, over the draw of the held-out images, if new images come from the
same distribution.
"""

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adaptive_inference.budgeted import ExitAnswers, assign_exits, curve_rows, geometric_thresholds
from utils import UserError

if TYPE_CHECKING:
    from adaptive_inference.policies import Point

LEARNING_PART = (
    10  # every so many-th held-out image sets thresholds; quantiles need few, the test is sharper with many
)
CERTIFICATE = {
    "procedure": "Learn then Test, fixed sequence from dear to cheap",
    "bound": "betting, Waudby-Smith and Ramdas",
    "split": f"of every {LEARNING_PART} held-out images the first sets the thresholds (geometric rule), the others test them",
    "losses": "images, wrong where the full network is right, right where it is wrong, another answer; of both parts",
    "level": 95.0,
}
MAX_STAKE = 0.9  # of the stake that may lose everything


class Losses(NamedTuple):
    """A policy's answers to ``images`` images beside the full network's: ``worse`` are wrong where that is right, ``better`` right where it
    is wrong, ``other`` all those of another class."""

    images: int
    worse: int
    better: int
    other: int

    @property
    def are_counts(self) -> bool:
        """Whether they can be what they should be."""
        return (
            all(type(n) is int and n >= 0 for n in self)
            and self.worse + self.better <= self.other <= self.images > 0
        )


class MaxLoss(NamedTuple):
    """At most ``percent`` of accuracy lost against the full network, or of answers that are others than its, with ``level`` percent
    confidence."""

    percent: float
    level: float = CERTIFICATE["level"]
    disagreement: bool = False

    def __str__(self) -> str:
        what = "answer otherwise than the full network on" if self.disagreement else "lose"
        return f"{what} at most {self.percent:g} % with {self.level:g} % confidence"


def rows_with_losses(answers: ExitAnswers, operations: Sequence[float], points: int = 40) -> list[dict]:
    """Policies and their losses, from the answers to the held-out images.

    Returns:
        Rows as of ``curve_rows``, with ``losses``: on the images that set the thresholds, and on those that test them; the results of the
        row are of the latter. None of them if there are too few images.
    """
    learns = torch.arange(len(answers.targets)) % LEARNING_PART == 0
    if learns.sum() in (0, len(learns)):
        return []
    learned, tested = answers.of(learns), answers.of(~learns)
    thresholds = geometric_thresholds(learned.confidence, points)
    rows = curve_rows(thresholds, tested, tested, operations)
    return [
        row | {"losses": (losses_of(own, learned), losses_of(own, tested))}
        for row, own in zip(rows, thresholds, strict=True)
    ]


def losses_of(thresholds: Tensor, answers: ExitAnswers) -> Losses:
    """Of the policy with these thresholds (K,)."""
    classes, targets = answers.classes, answers.targets
    answered = classes.gather(0, assign_exits(answers.confidence, thresholds)[None])[0]
    right, full_right = answered == targets, classes[-1] == targets
    events = (full_right & ~right, right & ~full_right, answered != classes[-1])
    return Losses(len(targets), *(int(event.sum()) for event in events))


def is_certain(losses: tuple[Losses, Losses], wanted: MaxLoss) -> bool:
    """Whether the tested images rule out that more than ``wanted`` is lost.

    Args:
        losses: on the images that set the thresholds, and on those that test them.
    """
    limit, needed = wanted.percent / 100, -math.log1p(-wanted.level / 100) if wanted.level < 100 else math.inf
    if limit >= 1:
        return True
    learned, tested = losses
    (known_up, known_down), (up, down) = (
        (x.other, 0) if wanted.disagreement else (x.worse, x.better) for x in losses
    )
    # The best stake against a loss of this variance; one more image, so that none at all is not believed.
    variance = (known_up + known_down + 1) / (learned.images + 1)
    stake = min(math.sqrt(2 * needed / (tested.images * variance)), MAX_STAKE / (1 - limit))
    counts = {1: up, -1: down, 0: tested.images - up - down}
    return sum(count * math.log1p(stake * (limit - loss)) for loss, count in counts.items()) >= needed


def certified(points: Sequence["Point"], wanted: MaxLoss) -> list["Point"]:
    """The points of the rule "tested" that keep the promise, from dear to cheap.

    Raises:
        UserError: none does; the line says what could be promised.
        ValueError: no such promise makes sense.
    """
    if not 0 <= wanted.percent <= 100 or not 50 <= wanted.level <= 100:
        raise ValueError(
            f"{wanted} cannot be promised: a loss is 0 to 100 percent, a level of confidence 50 to 100"
        )
    sequence = sorted((point for point in points if point.rule == "tested"), key=lambda point: -point.p)
    if not sequence:
        raise UserError(
            "nothing can be promised about accuracy: these policies were made without images to test them on"
        )
    kept = list(takewhile(lambda point: is_certain(point.losses, wanted), sequence))
    if not kept:
        losses = sequence[0].losses
        possible = next(
            tenth / 10 for tenth in range(1, 1001) if is_certain(losses, wanted._replace(percent=tenth / 10))
        )
        raise UserError(
            f"no policy is certain to {wanted}: {losses[1].images} images tested them; what can be promised starts at {possible:g} %"
        )
    return kept
