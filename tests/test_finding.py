"""From logits to policies of all rules, to a file, and to a predictor."""

import pytest
import torch

from adaptive_inference import (
    AdaptivePredictor,
    choose,
    find_policies,
    fit_full_policy,
    read_policy,
    write_policy,
)
from adaptive_inference.calibration import ensemble_classes
from adaptive_inference.confidence import assign_exits, confidence_by_exit
from adaptive_inference.promises.risk import MaxLoss, learning_images, with_certified_points
from models import MSDNet
from tests.conftest import TINY_NETWORK
from tests.helpers import OPERATIONS, make_predictions
from utils import UserError


@pytest.fixture
def network():
    return MSDNet(**TINY_NETWORK).eval()


def rules_of(curve):
    return {
        rule: sum(point.rule == rule for point in curve.points) for rule in {p.rule for p in curve.points}
    }


def test_logits_are_all_that_a_policy_file_needs(network, tmp_path):
    curve = find_policies(network, OPERATIONS, *make_predictions(400))
    assert rules_of(curve) == {"geometric": 40, "optimised": 40, "ensemble": 40}
    assert curve.num_images == 400
    with pytest.raises(UserError, match="not tested on held-out images"):
        choose(curve, max_loss=MaxLoss(1.0))
    with pytest.raises(UserError, match="operations is '40%'; it is a number"):
        choose(curve, operations="40%")
    write_policy(tmp_path / "policy.json", curve)
    again = read_policy(tmp_path / "policy.json", network)
    policy = choose(again, operations=20, rule="ensemble").policy
    assert AdaptivePredictor(network, policy)(torch.randn(4, 3, 32, 32)).classes.shape == (4,)


def test_no_policy_is_fitted_to_output_that_is_not_finite(network):
    logits, targets = make_predictions(400)
    logits[0, 3, 1], logits[1, 3, 2], logits[2, 7] = torch.inf, torch.nan, -torch.inf
    with pytest.raises(UserError, match="not finite for 2 of 400 held-out images"):
        find_policies(network, OPERATIONS, logits, targets)


def test_few_images_make_no_ensemble(network):
    assert rules_of(find_policies(network, OPERATIONS, *make_predictions(12))) == {
        "geometric": 40,
        "optimised": 40,
    }


def test_logits_in_half_precision_are_fitted_in_float32():
    logits, targets = make_predictions(2000)
    half = (4 * logits).half()  # sums over so many images are more than half precision can hold
    assert fit_full_policy(half, targets) == fit_full_policy(half.float(), targets)


@pytest.mark.parametrize("num_points", [40, 0])
def test_policies_certified_on_images_that_did_not_set_their_thresholds(network, num_points):
    val = make_predictions(400)
    policy = fit_full_policy(*val)
    found = find_policies(network, OPERATIONS, *val, policy)
    curve = with_certified_points(found, *val, policy, num_points)
    assert curve.points[: len(found.points)] == found.points
    certified = curve.points[len(found.points) :]
    assert {point.rule for point in certified} == {"certified"}
    assert len(certified) == num_points + 1
    assert certified[-1].policy.runs_everything
    assert all(point.policy.ensemble == policy.ensemble for point in certified)
    # Losses are counted against the last exit with its ensemble, whose accuracy the full network has.
    tested = ~learning_images(400) if num_points else torch.ones(400, dtype=torch.bool)
    classes, targets = ensemble_classes(val[0], policy.ensemble)[:, tested], val[1][tested]
    assert policy.ensemble is not None
    assert certified[-1].val_acc1 == pytest.approx(100 * (classes[-1] == targets).double().mean().item())
    thresholds = torch.tensor(certified[0].policy.thresholds)
    exits = assign_exits(confidence_by_exit(val[0])[0][:, tested], thresholds)
    other = classes.gather(0, exits[None])[0] != classes[-1]
    assert certified[0].losses.other == other.sum().item()
    assert choose(curve, max_loss=MaxLoss(100.0)) is not None
