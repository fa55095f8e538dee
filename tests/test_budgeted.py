"""Budgeted prediction: the released rule exactly, and a brute-force loop."""

import pytest
import torch

from adaptive_inference import evaluate_thresholds, geometric_thresholds
from adaptive_inference.budgeted import exit_shares
from adaptive_inference.confidence import assign_exits
from benchmarks import budgeted_rule
from tests.helpers import golden_predictions, predictions_of


def test_golden_table():
    val, test, operations, released = golden_predictions()
    all_thresholds = geometric_thresholds(val.confidence)
    assert len(all_thresholds) == 40
    for p, (thresholds, theirs) in enumerate(zip(all_thresholds, released, strict=True), start=1):
        assert exit_shares(p / 20, len(operations)).tolist() == theirs["q"]
        assert thresholds.tolist() == theirs["thresholds"]
        for name, predictions in (("val", val), ("test", test)):
            ours = evaluate_thresholds(thresholds, predictions, operations)
            assert ours.acc1 == pytest.approx(theirs[f"{name}_acc"], abs=1e-9)
            assert ours.operations == pytest.approx(theirs[f"{name}_flops"], rel=1e-6)  # in single precision


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
    for p, thresholds in enumerate(geometric_thresholds(confidence, num_points=10), start=1):
        assert thresholds.tolist() == brute_force_thresholds(confidence, exit_shares(p / 5, 4))
        exits = [next(k for k in range(4) if confidence[k, i] >= thresholds[k] or k == 3) for i in range(57)]
        assert assign_exits(confidence, thresholds).tolist() == exits


def test_shares_are_geometric_and_sum_to_one():
    shares = exit_shares(0.5, 4)
    torch.testing.assert_close(shares, torch.tensor([8.0, 4.0, 2.0, 1.0]) / 15)


def test_one_exit_takes_everything():
    predictions = predictions_of(torch.rand(1, 5), torch.rand(1, 5) > 0.5)
    for thresholds in geometric_thresholds(predictions.confidence):
        assert evaluate_thresholds(thresholds, predictions, [7]).operations == 7


def test_benchmark(capsys):
    budgeted_rule.main(["--images", "50", "--classes", "3"])
    assert "40 budgets, 2 x 50 images, 5 exits, 3 classes" in capsys.readouterr().out
