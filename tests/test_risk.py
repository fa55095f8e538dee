"""Promises about accuracy hold as often as they say, and claim no more than the images can tell."""

import math
from functools import cache

import pytest
import torch

from adaptive_inference.budgeted import ExitPredictions
from adaptive_inference.confidence import NONE_LEAVE
from adaptive_inference.policies import LossCounts, Point, Policy
from adaptive_inference.promises.risk import (
    MaxLoss,
    certified,
    certified_points,
    learning_images,
    p_value,
)
from experiments import risk as experiment
from utils import UserError

FULL = Policy((NONE_LEAVE, 0.0))


def chance(images, worse, better, shares):
    """Return the trinomial probability of these counts, for shares of worse and better images."""
    counts = [(worse, shares[0]), (better, shares[1]), (images - worse - better, max(1 - sum(shares), 0.0))]
    coefficient = math.comb(images, worse) * math.comb(images - worse, better)
    return coefficient * math.prod(share**count for count, share in counts)


@cache
def accepted(images, limit, level):
    """Return the counts (worse, better) for which a loss below the limit is certain at the level."""
    pairs = [(worse, better) for worse in range(images + 1) for better in range(images + 1 - worse)]
    return [pair for pair in pairs if p_value(LossCounts(images, *pair, sum(pair)), limit) <= 1 - level / 100]


@pytest.mark.parametrize("level", [pytest.param(90.0, marks=pytest.mark.slow), 95.0, 99.0])
@pytest.mark.parametrize("limit", [0.02, 0.1])
def test_the_trinomial_test_is_exact(limit, level):
    """At the limit, whatever the share of changed images, an error is at most as likely as 1 - level."""
    images = 28
    for changed in torch.linspace(limit, 1, 60, dtype=torch.float64).tolist():
        shares = (changed + limit) / 2, max(changed - limit, 0.0) / 2
        wrong = sum(chance(images, *pair, shares) for pair in accepted(images, limit, level))
        assert wrong <= 1 - level / 100 + 2e-5


@pytest.mark.parametrize(("worse", "better", "limit"), [(0, 3, 0.0), (0, 3, 0.005), (2, 3, 0.1)])
def test_the_p_value_is_the_largest_of_all_shares(worse, better, limit):
    """No share of changed images makes so small a loss more likely, however close one looks."""
    images = 58

    def studentised(up, down):
        variance = max(up + down, images * limit) - images * limit**2
        return (up - down - images * limit) / math.sqrt(max(variance, 1e-12))

    pairs = [(up, down) for up in range(images + 1) for down in range(images + 1 - up)]
    small = [pair for pair in pairs if studentised(*pair) <= studentised(worse, better) + 1e-9]
    largest = max(
        sum(chance(images, *pair, ((changed + limit) / 2, (changed - limit) / 2)) for pair in small)
        for changed in torch.linspace(0.06, 0.19, 80, dtype=torch.float64).tolist()
    )
    found = p_value(LossCounts(images, worse, better, worse + better), limit)
    assert largest <= found <= largest + 2e-5


def test_the_binomial_test_is_exact():
    """1,000 images, a limit of 2 %: certain at 95 % with up to 12 other predictions, as tables say."""
    assert p_value(LossCounts(1000, 0, 0, 12), 0.02, disagreement=True) == pytest.approx(0.0378, abs=2e-4)
    assert p_value(LossCounts(1000, 0, 0, 13), 0.02, disagreement=True) == pytest.approx(0.0644, abs=2e-4)
    assert p_value(LossCounts(1000, 0, 0, 1000), 0.02, disagreement=True) == pytest.approx(1.0)
    assert p_value(LossCounts(10, 0, 0, 10), 1.0, disagreement=True) == 0.0


def drawn(images, worse, better, generator):
    """Return the losses on so many images of a policy with these probabilities."""
    chances = torch.rand(images, generator=generator)
    up, down = int((chances < worse).sum()), int((chances > 1 - better).sum())
    return LossCounts(images, up, down, up + down)


@pytest.mark.parametrize("disagreement", [False, True])
def test_power_is_near_that_of_a_test_that_knows_the_variance(disagreement):
    """Two and a half standard errors below the limit, such a test certifies 80 % of the policies at 95 %."""
    generator = torch.Generator().manual_seed(0)
    images, share = 4500, 0.02
    better = 0.0 if disagreement else share
    error = math.sqrt((share + better) / images)
    limit = share - better + 2.5 * error
    losses = [drawn(images, share, better, generator) for _ in range(100)]
    passed = sum(p_value(counts, limit, disagreement) <= 0.05 for counts in losses)
    assert passed / 100 > 0.70


def certified_point(p, counts, policy=None):
    own = policy or Policy((0.5, 0.5))
    return Point(own, 50.0, float(p), (0.5, 0.5), "certified", p, counts)


def test_the_sequence_stops_at_the_first_policy_that_may_lose_too_much():
    counts = {1: 5, 2: 500, 3: 5, 4: 5}
    points = [certified_point(p, LossCounts(5000, worse, 5, 5 + worse)) for p, worse in counts.items()]
    full = certified_point(5, LossCounts(5000, 0, 0, 0), FULL)
    assert [point.number for point in certified([full, *points], MaxLoss(1.0))] == [5, 4, 3]
    assert [point.number for point in certified([full, *points], MaxLoss(1.0, 99.9))] == [5, 4, 3]
    with pytest.raises(UserError, match="no held-out images tested"):
        certified([], MaxLoss(1.0))
    with pytest.raises(ValueError, match="0 to 100 percent"):
        certified(points, MaxLoss(101.0))


def test_the_full_network_is_always_certified():
    full = certified_point(2, LossCounts(5, 0, 0, 0), FULL)
    for wanted in (MaxLoss(0.0), MaxLoss(0.0, 100.0), MaxLoss(0.0, disagreement=True), MaxLoss(1.0, 100.0)):
        assert certified([certified_point(1, LossCounts(5, 0, 0, 0)), full], wanted) == [full]


def test_a_loss_well_within_the_limit_is_certain():
    point = certified_point(1, LossCounts(4500, 60, 30, 120))  # 0.67 % lost
    assert certified([point], MaxLoss(1.2)) == [point]
    assert certified([point], MaxLoss(0.9)) == []


def predictions(count=200):
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(3, count, generator=generator)
    classes = torch.randint(3, (3, count), generator=generator)
    return ExitPredictions(confidence, classes, torch.randint(3, (count,), generator=generator))


def test_losses_against_a_loop():
    confidence, classes, targets = predictions()
    learns = learning_images(200)
    points = certified_points(predictions(), Policy((0.0,) * 3), [1, 2, 3], num_points=4)
    assert len(points) == 5
    assert points[-1].policy.runs_everything
    for point in points:
        counts = [0] * 4
        for i in (~learns).nonzero().flatten().tolist():
            k = next(k for k in range(3) if confidence[k, i] >= point.policy.thresholds[k] or k == 2)
            ours, full, right = classes[k, i], classes[2, i], targets[i]
            events = (True, ours != right == full, ours == right != full, ours != full)
            counts = [a + int(b) for a, b in zip(counts, events, strict=True)]
        assert list(point.losses) == counts


def test_the_split_is_drawn_by_a_seed():
    learns = learning_images(1000)
    assert learns.sum() == 100
    assert learns.tolist() == learning_images(1000).tolist() != learning_images(1000, seed=1).tolist()
    assert learns.nonzero().flatten().diff().unique().numel() > 10  # not every tenth in the order of files


@pytest.mark.parametrize(("count", "points"), [(3, 40), (200, 0)])
def test_without_images_to_test_them_only_the_full_network_remains(count, points):
    (point,) = certified_points(predictions(count), Policy((0.0,) * 3), [1, 2, 3], points)
    assert point.policy.runs_everything
    assert point.losses == LossCounts(count, 0, 0, 0)


def printed(capsys, *words):
    experiment.main([str(word) for word in words])
    return capsys.readouterr().out


def test_the_simulation_prints_violations_and_power(capsys):
    lines = printed(capsys, "simulate", "--trials", "10", "--images", "90", "--max-loss", "5").splitlines()
    rows = [line.split() for line in lines if "+-" in line]
    assert len(rows) == 2 * len(experiment.DISTANCES) * len(experiment.LEVELS)
    assert {row[1] for row in rows} == {"90", "95", "99"}
    at_limit = [row for row in rows if row[0] == "0"]
    assert all(float(row[5]) <= 100 - float(row[1]) for row in at_limit)  # exact, so no chance
    beyond = [float(row[2]) for row in rows if row[0] == "-1"]
    assert max(beyond) <= 20


@pytest.mark.parametrize("disagreement", [False, True])
def test_exact_chance_of_a_certificate(disagreement):
    """It equals the sum over all outcomes, and at the limit it is at most 1 - level."""
    images, better, limit = 30, 0.0 if disagreement else 0.05, 0.1
    boundary = experiment.Boundary(images, limit, 90.0, disagreement)
    worse = better + limit
    expected = 0.0
    for up in range(images + 1):
        for down in range(images + 1 - up if better else 1):
            if p_value(LossCounts(images, up, down, up + down), limit, disagreement) <= 0.1:
                ways = math.comb(images, up) * math.comb(images - up, down)
                expected += ways * worse**up * better**down * (1 - worse - better) ** (images - up - down)
    assert boundary.chance_below(worse, better) == pytest.approx(expected, rel=1e-6)
    assert 0.01 < expected <= 0.1


@pytest.mark.parametrize("distance", experiment.DISTANCES)
def test_simulated_policies_lie_where_they_should(distance):
    for better in (0.0, 0.02):
        worse = experiment.at_distance(0.01, better, 4500, distance)
        loss = worse - better
        error = math.sqrt((worse + better - loss**2) / 4500)
        assert loss + distance * error == pytest.approx(0.01)


def test_experiments_on_a_network(finished, tiny_demo, capsys):
    text = printed(capsys, "saved", finished / "IMTA")
    assert "58 held-out images test 41 policies" in text
    assert text.count("with 95 % confidence") == 6
    text = printed(capsys, "resample", finished / "IMTA", "--trials", "3")
    assert "3 trials of 64 held-out images, drawn from 96 test images" in text
    assert experiment.main(["saved", "nowhere"]) == 2
    assert "no checkpoint" in capsys.readouterr().err
