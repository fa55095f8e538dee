"""The predictor for the flags of predict.py.

Example:
    choice = choose_predictor(arguments, policy_path(path), network, batch_size)
    choice.predictor(images)
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adaptive_inference.confidence import NONE_LEAVE
from adaptive_inference.fold import fold
from adaptive_inference.loading import folded_for
from adaptive_inference.points import choose, eligible_points
from adaptive_inference.policies import Point, Policy, PolicyCurve
from adaptive_inference.policy_files import read_policy
from adaptive_inference.predictor import AdaptivePredictor
from adaptive_inference.promises.deadlines import (
    HORIZON_CALLS,
    HORIZON_IMAGES,
    AnytimePredictor,
    BudgetPredictor,
)
from adaptive_inference.promises.risk import CONFIDENCE_PERCENT, MaxLoss
from adaptive_inference.timing import BlockTimes, measure_blocks
from models import ExitNetwork
from utils import percent


class ChosenPredictor(NamedTuple):
    """A predictor, and what decides which images leave.

    Attributes:
        predictor: The predictor.
        metadata: Entries that describe its policy, for JSON.
        summary: The same in a line, for people.
        curve: The policies of the file, None if there is none and none is needed.
    """

    predictor: AdaptivePredictor
    metadata: dict[str, Any]
    summary: str
    curve: PolicyCurve | None


def choose_predictor(
    arguments: argparse.Namespace, policy_file: Path, network: ExitNetwork, batch_size: int
) -> ChosenPredictor:
    """Return the predictor for the flags of predict.py.

    Args:
        arguments: Parsed command line of predict.py. Read are policy, rule, budget, accuracy, max_loss,
            confidence_level, disagreement, deadline and drift_alarm.
        policy_file: File of the network's policies, which need not exist where nothing asks for one.
        network: Network with a description, on its device.
        batch_size: Images at a time.

    Raises:
        UserError: No policy satisfies the request; the line says what is possible.
    """
    is_needed = arguments.policy or arguments.rule or arguments.drift_alarm or _has_limit(arguments)
    curve = read_policy(policy_file) if is_needed or policy_file.exists() else None
    folded = fold(network) if curve is None else folded_for(network, curve, policy_file)
    if arguments.deadline is not None:
        return _by_deadline(folded, curve, arguments.deadline, batch_size)
    if curve is None:
        policy = _whole_network(folded)
        summary = (
            f"there is no {policy_file}, which --evalmode dynamic writes: every image runs the full network"
        )
        return ChosenPredictor(AdaptivePredictor(folded, policy), _metadata(policy), summary, curve)
    if arguments.budget is not None and arguments.budget.unit == "ms":
        return _by_milliseconds(folded, curve, arguments, batch_size)
    return _by_operations(folded, curve, arguments)


def _has_limit(arguments: argparse.Namespace) -> bool:
    return any(limit is not None for limit in (arguments.budget, arguments.accuracy, arguments.max_loss))


def _by_deadline(
    network: ExitNetwork, curve: PolicyCurve | None, deadline: float, batch_size: int
) -> ChosenPredictor:
    policy, timing = _whole_network(network), _measure(network, batch_size)
    if curve is not None:  # for its temperatures or ensemble
        policy = replace(curve.of_rule(None)[0].policy, thresholds=policy.thresholds)
    summary = f"each batch of {batch_size} gets the last exit that ends within {deadline:g} ms; {timing}"
    predictor = AnytimePredictor(network, deadline, timing, policy)
    return ChosenPredictor(predictor, _metadata(policy, deadline_milliseconds=deadline), summary, curve)


def _by_milliseconds(
    network: ExitNetwork, curve: PolicyCurve, arguments: argparse.Namespace, batch_size: int
) -> ChosenPredictor:
    timing, promise = _measure(network, batch_size), _promise(arguments)
    points = eligible_points(curve, arguments.accuracy, promise, arguments.rule)
    predictor = BudgetPredictor(network, points, arguments.budget.amount, timing)
    expected = timing.milliseconds(predictor.point.shares)
    note = (
        f"; {expected:.3g} ms per image expected ({timing}); the policy changes with the time really spent, "
        f"and the mean holds over about {HORIZON_IMAGES + HORIZON_CALLS * batch_size} images or more"
    )
    return _choice_of_point(predictor, predictor.point, curve, promise, note)


def _by_operations(
    network: ExitNetwork, curve: PolicyCurve, arguments: argparse.Namespace
) -> ChosenPredictor:
    promise, note = _promise(arguments), ""
    if _has_limit(arguments):
        operations = None
        if arguments.budget is not None:
            amount = arguments.budget.amount
            # In this order: 100 % are exactly all operations.
            operations = (
                amount * 1e6 if arguments.budget.unit == "M" else amount * curve.full_operations / 100
            )
        point = choose(
            curve,
            operations=operations,
            accuracy=arguments.accuracy,
            max_loss=promise,
            rule=arguments.rule,
        )
    else:
        point = curve.default_point(arguments.rule)
        note = "; nothing was asked for (--budget, --max-loss, --deadline): the policy nearest to half"
    return _choice_of_point(AdaptivePredictor(network, point.policy), point, curve, promise, note)


def _promise(arguments: argparse.Namespace) -> MaxLoss | None:
    if arguments.max_loss is None:
        return None
    level = CONFIDENCE_PERCENT if arguments.confidence_level is None else arguments.confidence_level
    return MaxLoss(arguments.max_loss, level, arguments.disagreement)


def _choice_of_point(
    predictor: AdaptivePredictor, point: Point, curve: PolicyCurve, promise: MaxLoss | None, note: str
) -> ChosenPredictor:
    metadata = {"rule": point.rule, "p": point.number, "val_acc1": round(point.val_acc1, 3)}
    if promise is not None:
        metadata["promise"], note = str(promise), f"{note}; the promise is to {promise}"
    # Certified policies have their results on the images that tested them.
    count = curve.num_images if point.losses is None else point.losses.images
    images = "held-out images" if count is None else f"{count:,} held-out images"
    right = percent(point.val_acc1, count)
    summary = (
        f"policy {point.number} of the {point.rule} rule: {right} % of {images} "
        f"right with {point.operations / 1e6:.2f} M operations per image "
        f"({100 * point.operations / curve.operations[-1]:.0f} % of the network){note}"
    )
    return ChosenPredictor(predictor, metadata | _metadata(point.policy), summary, curve)


def _metadata(policy: Policy, deadline_milliseconds: float | None = None) -> dict[str, Any]:
    return {
        "measure": policy.measure,
        "thresholds": policy.thresholds,
        "deadline_milliseconds": deadline_milliseconds,
    }


def _whole_network(network: ExitNetwork) -> Policy:
    return Policy((NONE_LEAVE,) * network.num_exits)


def _measure(network: ExitNetwork, batch_size: int) -> BlockTimes:
    size, device = network.description.data.image_size, next(network.parameters()).device
    images = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
    return measure_blocks(network, images, batch_size)
