"""Find the policies of a network, from the logits of every exit for held-out images.

Example:
    network = models.load("imta_cifar100")
    operations = count_operations(network, 32)
    curve = find_policies(network, operations, logits, targets)    # logits (K, N, C), targets (N,)
    write_policy(Path("policy.json"), curve)

The images must be new to the network. ``promises.risk.with_certified_points`` adds policies that promise
something about accuracy.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from adaptive_inference.budgeted import ExitPredictions, geometric_thresholds
from adaptive_inference.calibration import fit_ensemble, fit_temperatures, with_ensemble
from adaptive_inference.confidence import NONE_LEAVE, without_half_precision
from adaptive_inference.fingerprint import describe, dtype_of, network_fingerprint
from adaptive_inference.optimised import optimised_thresholds
from adaptive_inference.points import evaluate_points
from adaptive_inference.policies import Point, Policy, PolicyCurve
from models import ExitNetwork
from utils import UserError


def find_policies(
    network: ExitNetwork,
    operations: Sequence[float],
    logits: Tensor,
    targets: Tensor,
    full_policy: Policy | None = None,
) -> PolicyCurve:
    """Find policies by the geometric and the optimised rule, and by that of ensembles if exits gain by them.

    Args:
        network: The network that gave the logits.
        operations: Operations to each exit, K numbers.
        logits: (K, N, C) of held-out images.
        targets: (N,).
        full_policy: Policy whose measure, temperatures and ensemble all policies get. If None, fit one with
            ``fit_full_policy``.

    Raises:
        UserError: As ``fit_full_policy``.
    """
    logits, targets = without_half_precision(logits.detach().cpu()), targets.cpu()
    policy = full_policy or fit_full_policy(logits, targets)
    predictions = ExitPredictions.from_logits(logits, targets, policy.measure)
    exit_policy = replace(policy, ensemble=None)
    rules = {
        "geometric": geometric_thresholds(predictions.confidence),
        "optimised": optimised_thresholds(predictions, operations),
    }
    points: list[Point] = []
    for rule, thresholds in rules.items():
        points += evaluate_points(rule, thresholds, exit_policy, predictions, operations)
    if policy.ensemble is not None:
        ensemble_predictions, ensemble_costs = with_ensemble(predictions, logits, policy.ensemble, operations)
        thresholds = optimised_thresholds(ensemble_predictions, ensemble_costs)
        points += evaluate_points("ensemble", thresholds, policy, ensemble_predictions, ensemble_costs)
    return policy_curve(network, operations, points, len(targets))


def fit_full_policy(logits: Tensor, targets: Tensor, measure: str = "softmax") -> Policy:
    """Return the policy of the full network: its temperatures and ensemble are shared by all others.

    Args:
        logits: (K, N, C) of held-out images.
        targets: (N,).
        measure: Measure of confidence of the policies, one of ``confidence.MEASURES``.

    Raises:
        UserError: Logits of some images are not finite: nothing could be fitted to them.
    """
    logits, targets = without_half_precision(logits.detach().cpu()), targets.cpu()
    count = int((~logits.isfinite()).any(dim=2).any(dim=0).sum())
    if count > 0:
        raise UserError(
            f"the network's output is not finite for {count:,} of {len(targets):,} held-out images; in half "
            "precision it may be too large (--amp off)"
        )
    temperatures = tuple(fit_temperatures(logits, targets))
    ensemble = fit_ensemble(logits, targets, temperatures)
    return Policy((NONE_LEAVE,) * len(logits), measure, temperatures, ensemble)


def policy_curve(
    network: ExitNetwork,
    operations: Sequence[float],
    points: Sequence[Point],
    num_images: int | None = None,
    certificate: dict[str, Any] | None = None,
) -> PolicyCurve:
    """Return the curve of ``network``, in the dtype of its logits; for the rest see ``PolicyCurve``."""
    return PolicyCurve(
        network_fingerprint(network),
        dtype_of(network),
        describe(network),
        tuple(operations),
        tuple(points),
        num_images,
        certificate,
    )
