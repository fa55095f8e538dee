"""Policy files are written whole and read with suspicion; budgets choose; optimised thresholds beat the geometric rule."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptive_inference import budgeted_curve
from adaptive_inference.form import form_for, inference_form
from adaptive_inference.optimised import optimised_curve, optimised_thresholds
from adaptive_inference.policies import Policy, choose, network_fingerprint, policy_curve, read_policy, write_policy
from adaptive_inference.risk import Losses, MaxLoss
from models import IMTA, MSDNet
from tests.conftest import TINY_NETWORK
from tests.test_budgeted import FIXTURE, two_class_probabilities
from utils import UserError

OPERATIONS = [10_000_000, 20_000_000, 40_000_000]


def row(p, accuracy, operations):
    return {
        "p": p,
        "thresholds": [0.9 - p / 100, 0.5, -1e8],
        "val_acc1": accuracy,
        "val_operations": operations,
        "val_shares": [1 - p / 10, 0.0, p / 10],
    }


@pytest.fixture
def network():
    return MSDNet(**TINY_NETWORK).eval()


@pytest.fixture
def curve(network):
    rows = [row(1, 50.0, 12e6), row(2, 61.0, 15e6), row(3, 60.0, 20e6), row(4, 70.0, 30e6)]
    losses = (Losses(100, 1, 0, 2), Losses(900, 5, 2, 9))
    by_rule = {"geometric": rows, "tested": [{**rows[2], "losses": losses}], "ensemble": rows[1:2]}
    return policy_curve(network, OPERATIONS, by_rule, temperatures=[1.5, 1.0, 0.5], ensemble=[[1, 0, 0], [0, 1, 0], [0.2, 0.3, 0.5]])


def test_round_trip(network, curve, tmp_path):
    write_policy(tmp_path / "policy.json", curve)
    assert read_policy(tmp_path / "policy.json", network) == curve
    assert read_policy(tmp_path / "policy.json", inference_form(network)) == curve
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]
    assert [point.rule for point in curve.points if point.policy.ensemble] == ["ensemble"]


class Timing:
    """One millisecond an exit."""

    def milliseconds(self, shares):
        return sum(share * k for k, share in enumerate(shares, start=1))


def test_wishes_choose(curve):
    rule = "geometric"
    assert choose(curve, operations=29e6, rule=rule).p == 2  # more accurate than the dearer point 3
    assert choose(curve, operations=30e6, rule=rule).p == 4
    assert choose(curve, milliseconds=1.7, timing=Timing(), rule=rule).p == 2
    assert choose(curve, accuracy=60.5, rule=rule).p == 2
    assert choose(curve, accuracy=61.5, rule=rule).p == 4
    assert choose(curve, operations=29e6, accuracy=60.5, rule=rule).p == 2
    assert choose(curve, max_loss=MaxLoss(2.0)).rule == "tested"
    assert curve.nearest(19e6, rule).p == 3
    assert curve.point(3, rule).operations == 20e6


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"operations": 11e6}, r"cheapest policy needs 12M; ask for 12M or 30%"),
        ({"milliseconds": 1.0, "timing": Timing()}, r"needs 1.2ms; ask for 1.2\d?ms"),
        ({"accuracy": 71}, "no policy reaches 71 % on the held-out images; the best has 70.00 %"),
        ({"operations": 20e6, "accuracy": 65}, "within the other limits reaches 65 %.*61.00 %"),
        ({"max_loss": MaxLoss(0.1)}, r"900 images tested them; what can be promised starts at \d"),
        ({"max_loss": MaxLoss(2.0), "operations": 12e6}, "certain to lose so little needs 20M"),
    ],
)
def test_wishes_that_cannot_be_granted(curve, wishes, message):
    """One line says what is possible."""
    with pytest.raises(UserError, match=message) as caught:
        choose(curve, **wishes, rule="geometric")
    assert "\n" not in str(caught.value)


def test_points_that_are_not_there(curve):
    with pytest.raises(UserError, match="numbered 1 to 4"):
        curve.point(9, "geometric")
    with pytest.raises(UserError, match="of the rule optimised; there are ensemble, geometric, tested"):
        curve.point(1, "optimised")


def test_best_rules_come_first(network, curve):
    assert choose(curve, operations=20e6).rule == "ensemble"
    curve = policy_curve(network, OPERATIONS, {"geometric": [row(1, 90.0, 12e6)], "optimised": [row(1, 80.0, 11e6)]})
    assert choose(curve, operations=20e6).rule == "optimised"
    assert choose(curve, operations=20e6, rule="geometric").val_acc1 == 90.0


def test_policy_of_another_network_or_form_is_refused(network, curve, tmp_path):
    path = tmp_path / "policy.json"
    write_policy(path, curve)
    others = MSDNet(**TINY_NETWORK), MSDNet(**{**TINY_NETWORK, "num_blocks": 4}), IMTA(MSDNet(**TINY_NETWORK))
    for other in others:
        with pytest.raises(UserError, match="policy of another network") as caught:
            read_policy(path, other)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="made for this network in float32, not in bfloat16"):
        read_policy(path, inference_form(network, dtype=torch.bfloat16))
    assert form_for(network, curve, path).fingerprint == curve.fingerprint


def test_fingerprint_follows_the_weights(network):
    before = network_fingerprint(network)
    assert before == network_fingerprint(network)
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1
    assert network_fingerprint(network) != before


def change(*keys, to):
    def edit(content):
        target = content
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = to
        return json.dumps(content)

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "",
        lambda content: "[" * 100_000,
        lambda content: json.dumps(content)[:-20],
        lambda content: json.dumps([content]),
        lambda content: json.dumps(content) + " " * 5 * 2**20,
        change("format", to="another"),
        change("network", to=None),
        change("network", "form", to=None),
        change("measure", to="luck"),
        change("measure", to=["softmax"]),
        change("temperatures", to=[1.0, 1.0, 0.0]),
        change("temperatures", to=[1.0]),
        change("ensemble", to=None),
        change("ensemble", to=[[1.0, 0.0]] * 3),
        change("ensemble", 0, to=[1.0, 0.0, "0"]),
        change("operations", to=[1] * 101),
        change("operations", to=[3, 2, 1]),
        change("operations", to="123"),
        change("points", to=[]),
        change("points", 0, to=7),
        change("points", 0, "thresholds", to=[0.5, 0.5]),
        change("points", 0, "thresholds", to=[0.5, True, 0.5]),
        change("points", 0, "thresholds", to=[0.5, "0.5", 0.5]),
        change("points", 0, "thresholds", 0, to=float("nan")),
        change("points", 0, "thresholds", 0, to=float("inf")),
        change("points", 0, "thresholds", 0, to=10**400),
        change("points", 0, "shares", to=[0.5, 0.5]),
        change("points", 0, "shares", to=[0.5, 0.4, 0.2]),
        change("points", 4, "losses", to=[[900, 5, 2, 9]]),
        change("points", 4, "losses", 0, to=[900, 5, 2]),
        change("points", 4, "losses", 0, to=[900, 5, 2, 901]),
        change("points", 0, "val_acc1", to=101),
        change("points", 0, "operations", to=None),
        change("points", 0, "rule", to="guess"),
        change("points", 0, "p", to=1.5),
    ],
)
def test_damaged_files_are_refused_in_one_line(curve, tmp_path, damage):
    path = tmp_path / "policy.json"
    write_policy(path, curve)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(UserError, match=r"policy\.json is no policy file") as caught:
        read_policy(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no policy file"):
        read_policy(tmp_path / "missing.json")
    with pytest.raises(UserError, match="cannot read"):
        read_policy(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no policy file"):
        read_policy(tmp_path / "binary.json")


@pytest.mark.parametrize("thresholds", [(), (float("nan"), 0.0), (float("inf"),)])
def test_impossible_policies(thresholds):
    with pytest.raises(ValueError, match="finite"):
        Policy(thresholds)
    with pytest.raises(ValueError, match="allowed"):
        Policy((0.5,), "luck")


def golden_parts():
    golden = torch.load(Path(FIXTURE), weights_only=True)
    parts = []
    for part in ("val", "test"):
        probs = two_class_probabilities(golden[f"{part}_confidence"], golden[f"{part}_correct"])
        parts += [probs, torch.zeros(probs.shape[1], dtype=torch.int64)]
    return parts, golden["flops"]


def gains(geometric, optimised):
    """Test accuracy of the optimised curve less the geometric one's at its costs, by interpolation."""
    (x, y), (new_x, new_y) = (zip(*sorted((r["operations"], r["test_acc1"]) for r in rows), strict=True) for rows in (geometric, optimised))
    return np.interp(x, new_x, new_y) - np.array(y)


def test_optimised_curve_is_above_the_geometric_one():
    parts, operations = golden_parts()
    geometric, optimised = budgeted_curve(*parts, operations), optimised_curve(*parts, operations)
    assert [r.keys() for r in optimised] == [r.keys() for r in geometric]
    for ours, theirs in zip(optimised, geometric, strict=True):
        assert ours["val_operations"] <= theirs["val_operations"] * 1.001
        assert sum(ours["q"]) == pytest.approx(1)
    assert gains(geometric, optimised).mean() > 0.5


def test_confidence_without_meaning_is_not_fitted():
    """Where confidence says nothing about correctness, what looks best on the held-out images is an accident."""
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(4):
        parts = []
        for count in (300, 5000):
            probs = two_class_probabilities(
                torch.rand(4, count, generator=generator),
                torch.rand(4, count, generator=generator) < torch.tensor([[0.6], [0.62], [0.64], [0.66]]),
            )
            parts += [probs, torch.zeros(count, dtype=torch.int64)]
        operations = [10.0, 20.0, 30.0, 40.0]
        losses.append(gains(budgeted_curve(*parts, operations), optimised_curve(*parts, operations)).mean())
    assert np.mean(losses) > -0.6


@pytest.mark.parametrize(("num_exits", "num_images"), [(1, 100), (3, 5), (3, 40)])
def test_optimised_thresholds_of_few_images_or_exits(num_exits, num_images):
    confidence = torch.rand(num_exits, num_images)
    thresholds = optimised_thresholds(confidence, confidence > 0.5, list(range(1, num_exits + 1)), points=5)
    assert thresholds.shape == (5, num_exits)
    assert thresholds[:, -1].tolist() == [-1e8] * 5


def test_equal_confidences_everywhere():
    confidence = torch.ones(3, 200)
    thresholds = optimised_thresholds(confidence, torch.rand(3, 200) < 0.5, [1, 2, 3], points=5)
    assert torch.isfinite(thresholds).all()
