"""Budgeted prediction: the released rule exactly, and a brute-force loop."""

import pytest
import torch

from adaptive_inference import assign_exits, budgeted_curve, exit_shares, geometric_thresholds
from tests.golden import FIXTURES


def golden_case():
    """Arguments of ``budgeted_curve``, and the released rows. Of the probabilities only what the rule reads is kept: the largest, and
    whether its class is right; so there are two classes here, and the right one is 0."""
    golden = torch.load(FIXTURES / "budgeted_prediction.pt", weights_only=True)
    arguments = []
    for part in ("val", "test"):
        confidence, correct = golden[f"{part}_confidence"], golden[f"{part}_correct"]
        probs = torch.zeros(*confidence.shape, 2).scatter_(2, (~correct).long()[:, :, None], confidence[:, :, None])
        arguments += [probs, torch.zeros(probs.shape[1], dtype=torch.int64)]
    return [*arguments, golden["flops"]], golden["rows"]


def test_golden_table():
    arguments, released = golden_case()
    rows = budgeted_curve(*arguments)
    assert len(rows) == 40
    for ours, theirs in zip(rows, released, strict=True):
        assert ours["q"] == theirs["q"]
        assert ours["thresholds"] == theirs["thresholds"]
        for name in ("val", "test"):
            assert ours[f"{name}_acc1"] == pytest.approx(theirs[f"{name}_acc"], abs=1e-9)
        for name, stored in (("val_operations", "val_flops"), ("operations", "test_flops")):
            assert ours[name] == pytest.approx(theirs[stored], rel=1e-6)  # stored in single precision


def brute_force_thresholds(confidence, shares):
    num_exits, num_images = confidence.shape
    gone, thresholds = set(), []
    for k in range(num_exits - 1):
        left = sorted((c for i, c in enumerate(confidence[k].tolist()) if i not in gone), reverse=True)
        wanted = int(num_images * shares[k])
        thresholds.append(left[wanted - 1] if 0 < wanted <= len(left) else 1e8)
        gone |= {i for i, c in enumerate(confidence[k].tolist()) if c >= thresholds[k]}
    return [*thresholds, -1e8]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_against_a_loop(seed, ties):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(4, 57, generator=generator)
    if ties:
        confidence = (confidence * 6).round() / 6
    for p in (1, 9, 20, 33, 40):
        shares = exit_shares(p / 20, 4)
        thresholds = geometric_thresholds(confidence, shares)
        assert thresholds.tolist() == brute_force_thresholds(confidence, shares)
        exits = [next(k for k in range(4) if confidence[k, i] >= thresholds[k] or k == 3) for i in range(57)]
        assert assign_exits(confidence, thresholds).tolist() == exits


def test_shares_are_geometric_and_sum_to_one():
    shares = exit_shares(0.5, 4)
    torch.testing.assert_close(shares, torch.tensor([8.0, 4.0, 2.0, 1.0]) / 15)


def test_one_exit_takes_everything():
    probs = torch.rand(1, 5, 3).softmax(2)
    rows = budgeted_curve(probs, torch.zeros(5).long(), probs, torch.zeros(5).long(), [7])
    assert {row["operations"] for row in rows} == {7}


def test_curve_with_another_number_of_points_covers_the_same_range():
    probs, targets = torch.rand(3, 50, 4).softmax(2), torch.randint(4, (50,))
    coarse = budgeted_curve(probs, targets, probs, targets, [1, 2, 3], points=4)
    fine = budgeted_curve(probs, targets, probs, targets, [1, 2, 3], points=40)
    assert [row["q"] for row in coarse] == [fine[i]["q"] for i in (9, 19, 29, 39)]


@pytest.mark.parametrize(
    ("probs", "targets", "operations"),
    [((3, 5, 2), (4,), 3), ((3, 5, 2), (5,), 2), ((5, 2), (5,), 5), ((3, 0, 2), (0,), 3)],
)
def test_shapes_that_do_not_belong_together(probs, targets, operations):
    good, good_targets = torch.rand(operations, 4, 2), torch.zeros(4).long()
    with pytest.raises(ValueError, match="val_probs"):
        budgeted_curve(torch.rand(*probs), torch.zeros(*targets).long(), good, good_targets, list(range(operations)))
