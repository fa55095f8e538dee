"""Promises about accuracy hold as often as they say, and say no more than the images can tell."""

import math

import pytest
import torch

from adaptive_inference import ExitAnswers
from adaptive_inference.policies import Point, Policy
from adaptive_inference.promises.risk import (
    LEARNING_PART,
    Losses,
    MaxLoss,
    certified,
    is_certain,
    rows_with_losses,
)
from utils import UserError


def drawn(count, worse, better, generator):
    """Losses on so many images of a policy with these probabilities."""
    chances = torch.rand(count, generator=generator)
    up, down = int((chances < worse).sum()), int((chances > 1 - better).sum())
    return Losses(count, up, down, up + down)


@pytest.mark.parametrize("disagreement", [False, True])
def test_a_policy_just_too_bad_is_rarely_certified(disagreement):
    """Of 2,000 draws at the limit itself, at most 5 %, and three standard errors."""
    generator = torch.Generator().manual_seed(0)
    better = 0.0 if disagreement else 0.03
    wanted = MaxLoss(2.0, 95.0, disagreement)
    chances = (0.02 + better, better, generator)
    passed = sum(is_certain((drawn(200, *chances), drawn(2000, *chances)), wanted) for _ in range(2000))
    assert passed / 2000 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_a_good_policy_is_certified():
    """The limit is three standard errors away."""
    generator = torch.Generator().manual_seed(0)
    passed = sum(
        is_certain((drawn(200, 0.02, 0.02, generator), drawn(2000, 0.02, 0.02, generator)), MaxLoss(1.5))
        for _ in range(200)
    )
    assert passed > 140


def test_more_confidence_and_smaller_losses_need_more():
    losses = (Losses(500, 10, 8, 20), Losses(4500, 90, 80, 200))
    assert is_certain(losses, MaxLoss(1.0))
    assert not is_certain(losses, MaxLoss(0.3))
    assert not is_certain(losses, MaxLoss(1.0, 99.99))
    assert not is_certain(losses, MaxLoss(1.0, disagreement=True))
    assert is_certain(losses, MaxLoss(100.0))
    assert not is_certain((losses[0], Losses(20, 0, 0, 0)), MaxLoss(1.0))  # too few images to tell


def point(p, worse):
    return Point(
        Policy((0.5, 0.5)),
        50.0,
        float(p),
        (0.5, 0.5),
        "tested",
        p,
        (Losses(500, 5, 5, 10), Losses(5000, worse, 5, 5 + worse)),
    )


def test_the_sequence_stops_at_the_first_policy_that_may_lose_too_much():
    points = [point(1, 5), point(2, 500), point(3, 5), point(4, 5)]
    assert [kept.p for kept in certified(points, MaxLoss(1.0))] == [4, 3]
    with pytest.raises(UserError, match=r"what can be promised starts at (\d+\.\d)") as caught:
        certified([point(1, 500)], MaxLoss(1.0))
    possible = float(str(caught.value).split("starts at ")[1].split()[0])
    assert certified([point(1, 500)], MaxLoss(possible))
    with pytest.raises(UserError):
        certified([point(1, 500)], MaxLoss(possible - 0.11))
    with pytest.raises(UserError, match="without images"):
        certified([], MaxLoss(1.0))


def test_losses_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    confidence, classes = (
        torch.rand(3, 200, generator=generator),
        torch.randint(3, (3, 200), generator=generator),
    )
    targets = torch.randint(3, (200,), generator=generator)
    for row in rows_with_losses(ExitAnswers(confidence, classes, targets), [1, 2, 3], points=4):
        counts = [[0] * 4, [0] * 4]
        for i in range(200):
            k = next(k for k in range(3) if confidence[k, i] >= row["thresholds"][k] or k == 2)
            ours, full, right = classes[k, i], classes[2, i], targets[i]
            events = (True, ours != right == full, ours == right != full, ours != full)
            counts[int(i % LEARNING_PART != 0)] = [
                a + int(b) for a, b in zip(counts[int(i % LEARNING_PART != 0)], events, strict=True)
            ]
        assert [list(losses) for losses in row["losses"]] == counts
