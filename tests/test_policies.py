"""Policy files are read strictly; budgets choose; optimised thresholds beat the geometric rule."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from adaptive_inference import (
    AdaptivePredictor,
    choose,
    evaluate_thresholds,
    fold,
    geometric_thresholds,
    load_predictor,
)
from adaptive_inference.finding import policy_curve
from adaptive_inference.fingerprint import network_fingerprint
from adaptive_inference.loading import folded_for
from adaptive_inference.optimised import optimised_thresholds
from adaptive_inference.points import evaluate_points
from adaptive_inference.policies import LossCounts, Policy
from adaptive_inference.policy_files import (
    from_format_2,
    policy_path,
    read_policy,
    write_policy,
)
from adaptive_inference.promises.risk import CERTIFICATE, MaxLoss
from models import IMTA, MSDNet, load
from models.files import WEIGHTS
from tests.conftest import TINY_NETWORK, policy_point
from tests.helpers import golden_predictions, predictions_of
from utils import UserError

OPERATIONS = [10_000_000, 20_000_000, 40_000_000]
POLICY = {"temperatures": (1.5, 1.0, 0.5)}
ENSEMBLE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.2, 0.3, 0.5))


def make_point(p, accuracy, operations):
    thresholds = [0.9 - p / 100, 0.5, -1e8]
    return policy_point(p, thresholds, accuracy, operations, [1 - p / 10, 0.0, p / 10], **POLICY)


def of_rule(point, rule, **changes):
    policy = replace(point.policy, ensemble=ENSEMBLE if rule == "ensemble" else None)
    return replace(point, rule=rule, policy=policy, **changes)


@pytest.fixture
def network():
    return MSDNet(**TINY_NETWORK).eval()


@pytest.fixture
def curve(network):
    points = [make_point(1, 50.0, 12e6), make_point(2, 61.0, 15e6), make_point(3, 60.0, 20e6)]
    points.append(make_point(4, 70.0, 30e6))
    certified = of_rule(points[2], "certified", losses=LossCounts(900, 5, 2, 9))
    points += [certified, of_rule(points[1], "ensemble")]
    return policy_curve(network, OPERATIONS, points, 1000, CERTIFICATE)


def test_round_trip(network, curve, tmp_path):
    write_policy(tmp_path / "policy.json", curve)
    assert read_policy(tmp_path / "policy.json", network) == curve
    assert read_policy(tmp_path / "policy.json", fold(network)) == curve
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]
    assert [point.rule for point in curve.points if point.policy.ensemble] == ["ensemble"]


def test_a_number_that_is_not_finite_is_not_written(curve, tmp_path):
    first = replace(curve.points[0], operations=float("inf"))
    with pytest.raises(ValueError, match="JSON"):
        write_policy(tmp_path / "policy.json", replace(curve, points=(first, *curve.points[1:])))
    assert list(tmp_path.iterdir()) == []


def test_thresholds_become_points():
    val, _, operations, _ = golden_predictions()
    thresholds = geometric_thresholds(val.confidence)
    points = evaluate_points("geometric", thresholds, Policy((0.0,) * len(operations)), val, operations)
    assert [point.number for point in points] == list(range(1, 41))
    assert [list(point.policy.thresholds) for point in points] == thresholds.tolist()
    assert points[7].val_acc1 == evaluate_thresholds(thresholds[7], val, operations).acc1


def test_a_file_of_format_2_is_converted(curve, tmp_path):
    """Its points stay, but for those that promised something against the last exit alone."""
    write_policy(tmp_path / "policy.json", curve)
    old = json.loads((tmp_path / "policy.json").read_text())
    old["network"]["form"] = old["network"].pop("dtype")
    old |= {"format": "imta-msdnet policy 2", "certificate": {"bound": "betting"}}
    del old["num_images"]
    for row in old["points"]:
        row.pop("uses_ensemble", None)
        if row["rule"] == "certified":
            row |= {"rule": "tested", "losses": [[100, 1, 0, 2], [900, 5, 2, 9]]}
    (tmp_path / "policy.json").write_text(json.dumps(from_format_2(old)))
    converted = read_policy(tmp_path / "policy.json")
    kept = tuple(point for point in curve.points if point.rule != "certified")
    assert converted == replace(curve, points=kept, certificate=None)
    with pytest.raises(UserError, match="nothing can be promised"):
        choose(converted, max_loss=MaxLoss(2.0))


def test_names_of_files_say_the_dtype(curve, tmp_path):
    network_file = tmp_path / "tiny.safetensors"
    assert policy_path(network_file, "bfloat16") == tmp_path / "policy.json"
    for name in ("tiny.policy.json", "tiny.policy.bfloat16.json"):
        write_policy(tmp_path / name, curve)
    assert policy_path(network_file) == tmp_path / "tiny.policy.json"
    assert policy_path(network_file, "bfloat16") == tmp_path / "tiny.policy.bfloat16.json"
    assert policy_path(network_file, "float16") == tmp_path / "tiny.policy.json"
    (tmp_path / "tiny.policy.json").unlink()
    assert policy_path(network_file) == tmp_path / "tiny.policy.bfloat16.json"  # better than none


def test_limits_choose(curve):
    rule = "geometric"
    # Point 2 is more accurate than point 3, which is more expensive.
    assert choose(curve, operations=29e6, rule=rule).number == 2
    assert choose(curve, operations=30e6, rule=rule).number == 4
    assert choose(curve, accuracy=60.5, rule=rule).number == 2
    assert choose(curve, accuracy=61.5, rule=rule).number == 4
    assert choose(curve, operations=29e6, accuracy=60.5, rule=rule).number == 2
    assert choose(curve, max_loss=MaxLoss(2.0)).rule == "certified"
    with pytest.raises(ValueError, match="geometric promises nothing"):
        choose(curve, max_loss=MaxLoss(2.0), rule=rule)
    with pytest.raises(ValueError, match="50 to 100"):
        choose(curve, max_loss=MaxLoss(2.0, 0.95))
    with pytest.raises(TypeError, match="must be a promise"):
        choose(curve, max_loss=2.0)
    cheaper = tuple(point for point in curve.points if not point.policy.runs_everything)
    with pytest.raises(UserError, match="the full network is not the last policy"):
        choose(replace(curve, points=cheaper), max_loss=MaxLoss(0.0))
    with pytest.raises(UserError, match="a budget of nanM is too small"):
        choose(curve, operations=math.nan)
    assert curve.nearest(19e6, rule).number == 3
    assert curve.default_point(rule).number == 3
    with pytest.raises(UserError, match="of the rule optimised; there are certified, ensemble, geometric"):
        curve.of_rule("optimised")


def test_best_rules_come_first(network, curve):
    assert choose(curve, operations=20e6).rule == "ensemble"
    points = [make_point(1, 90.0, 12e6), of_rule(make_point(1, 80.0, 11e6), "optimised")]
    curve = policy_curve(network, OPERATIONS, points)
    assert choose(curve, operations=20e6).rule == "optimised"
    assert choose(curve, operations=20e6, rule="geometric").val_acc1 == 90.0


def test_policy_of_another_network_or_dtype_is_refused(network, curve, tmp_path):
    path = tmp_path / "policy.json"
    write_policy(path, curve)
    others = MSDNet(**TINY_NETWORK), MSDNet(**{**TINY_NETWORK, "num_blocks": 4}), IMTA(MSDNet(**TINY_NETWORK))
    for other in others:
        with pytest.raises(UserError, match="policy of another network") as caught:
            read_policy(path, other)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="made for this network in float32, not in bfloat16"):
        read_policy(path, fold(network, dtype=torch.bfloat16))
    assert folded_for(network, curve, path).fingerprint == curve.fingerprint


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
        lambda content: json.dumps(content) + " " * 5 * 2**20,
        change("format", to="another"),
        change("network", "dtype", to=None),
        change("measure", to="luck"),
        change("temperatures", to=[1.0, 1.0, 0.0]),
        change("ensemble", to=[[1.0, 0.0]] * 3),
        change("operations", to=[3, 2, 1]),
        change("points", to=[]),
        change("points", 0, "thresholds", to=[0.5, 0.5]),
        change("points", 0, "thresholds", to=[0.5, True, 0.5]),
        change("points", 0, "thresholds", 0, to=float("nan")),
        change("points", 0, "thresholds", 0, to=10**400),
        change("points", 0, "shares", to=[0.5, 0.4, 0.2]),
        change("num_images", to=-1),
        change("ensemble", 0, 0, to=float("nan")),
        change("points", 4, "losses", "other", to=901),
        change("points", 4, "losses", to=[900, 5, 2, 9]),
        change("points", 0, "val_acc1", to=101),
        change("points", 0, "rule", to="guess"),
        change("points", 0, "p", to=1.5),
        lambda content: b"\xff\xfe\x00",
    ],
)
def test_damaged_files_are_refused_in_one_line(curve, tmp_path, damage):
    path = tmp_path / "policy.json"
    write_policy(path, curve)
    damaged = damage(json.loads(path.read_text()))
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(UserError, match=r"policy\.json cannot be read as a policy file") as caught:
        read_policy(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        read_policy(tmp_path)


@pytest.mark.parametrize("thresholds", [(), (float("nan"), 0.0), (float("inf"),)])
def test_impossible_policies(thresholds):
    with pytest.raises(ValueError, match="finite"):
        Policy(thresholds)
    with pytest.raises(ValueError, match="allowed"):
        Policy((0.5,), "luck")


def gains(geometric, optimised):
    """Return the test accuracy of the optimised curve minus the geometric one's at the same costs."""
    (x, y), (new_x, new_y) = (
        zip(*sorted((result.operations, result.acc1) for result in results), strict=True)
        for results in (geometric, optimised)
    )
    return np.interp(x, new_x, new_y) - np.array(y)


def test_optimised_curve_is_above_the_geometric_one():
    val, test, operations, _ = golden_predictions()
    rules = geometric_thresholds(val.confidence), optimised_thresholds(val, operations)
    for theirs, ours in zip(*rules, strict=True):
        limit = evaluate_thresholds(theirs, val, operations).operations
        assert evaluate_thresholds(ours, val, operations).operations <= limit * 1.001
    results = [[evaluate_thresholds(row, test, operations) for row in rule] for rule in rules]
    assert gains(*results).mean() > 0.5


@pytest.mark.parametrize(
    ("num_exits", "num_images", "ties"), [(1, 100, False), (3, 5, False), (3, 40, False), (3, 200, True)]
)
def test_optimised_thresholds_of_few_images_or_exits_or_equal_confidences(num_exits, num_images, ties):
    confidence = torch.ones(num_exits, num_images) if ties else torch.rand(num_exits, num_images)
    thresholds = optimised_thresholds(
        predictions_of(confidence, torch.rand_like(confidence) > 0.5),
        list(range(1, num_exits + 1)),
        num_points=5,
    )
    assert thresholds.shape == (5, num_exits)
    assert thresholds[:, -1].tolist() == [-1e8] * 5
    assert torch.isfinite(thresholds).all()


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("*.policy*.json")), ids=lambda path: path.name)
def test_shipped_policies_save_operations_with_a_promise(path):
    curve = read_policy(path)
    shares = [choose(curve, max_loss=MaxLoss(limit)).operations / curve.operations[-1] for limit in (0, 1, 2)]
    assert shares[0] > shares[1] > shares[2]
    assert shares[1] < 0.65
    assert curve.num_images == 5000


@pytest.mark.parametrize("name", ["imta_cifar100", "msdnet_cifar100", "msdnet_boosted_cifar100"])
def test_shipped_networks_carry_thresholds_of_optimised_policies(name):
    network, images = load(WEIGHTS / f"{name}.safetensors"), torch.randn(16, 3, 32, 32)
    policies = {
        point.policy.thresholds: point
        for point in read_policy(WEIGHTS / f"{name}.policy.json").of_rule("optimised")
    }
    assert list(network.description.thresholds) == ["25", "50", "75"]
    for percent, thresholds in network.description.thresholds.items():
        point = policies[tuple(thresholds)]
        assert point.operations <= int(percent) / 100 * network.description.operations[-1]
        _, exits = network.early_exit(images, thresholds)
        assert exits.equal(AdaptivePredictor(network, point.policy)(images).exits)


def test_a_predictor_is_loaded_in_the_dtype_of_its_policies():
    assert load_predictor("imta_cifar100").network.dtype == torch.float32
    assert load_predictor("imta_cifar100", torch.bfloat16).network.dtype == torch.bfloat16
    with pytest.raises(UserError, match="no policies for float16"):
        load_predictor("imta_cifar100", torch.float16)
    whole = load_predictor("imta_cifar100", max_loss=MaxLoss(0.0))
    assert whole.policy.runs_everything
