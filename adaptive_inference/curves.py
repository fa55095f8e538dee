"""Policy curves of a network: made from held-out predictions, or read from a file that must be the network's.

points = evaluate_points("geometric", thresholds, policy, val, operations)
curve = policy_curve(network, operations, points)
curve = read_policy(Path("save/demo/IMTA/policy.json"), network)
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptive_inference.budgeted import ExitPredictions, evaluate_thresholds
from adaptive_inference.fingerprint import describe, dtype_of, network_fingerprint
from adaptive_inference.policies import Point, Policy, PolicyCurve, read_curve
from models import ExitNetwork
from utils import UserError


def evaluate_points(
    rule: str, thresholds: Tensor, policy: Policy, val: ExitPredictions, operations: Sequence[float]
) -> tuple[Point, ...]:
    """Return one point for each row of thresholds.

    Args:
        rule: how they were found.
        thresholds: (P, K).
        policy: measure, temperatures and ensemble of all of them.
        val: predictions for held-out images.
        operations: to each exit.
    """
    points = []
    for p, row in enumerate(thresholds, start=1):
        own = replace(policy, thresholds=tuple(row.tolist()))
        points.append(Point(own, *evaluate_thresholds(row, val, operations), rule, p))
    return tuple(points)


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


def read_policy(path: str | Path, network: ExitNetwork | None = None) -> PolicyCurve:
    """Read a policy file.

    Args:
        path: of the file.
        network: the network it must belong to; None: do not check.

    Raises:
        UserError: one line: the file is missing, too large, damaged, or of another network or dtype.
    """
    curve = read_curve(path)
    if network is not None:
        check_curve(curve, network, Path(path))
    return curve


def check_curve(curve: PolicyCurve, network: ExitNetwork, source: Path) -> None:
    """Check that the curve was made for this network and dtype.

    Raises:
        UserError: it was made for another; ``source`` is named.
    """
    if (len(curve.operations), curve.fingerprint) != (network.num_exits, network_fingerprint(network)):
        raise UserError(
            f"{source} is the policy of another network ({curve.network}); "
            "--evalmode dynamic makes one for this network"
        )
    if curve.dtype != dtype_of(network):
        raise UserError(
            f"{source} was made for this network in {curve.dtype}, not in {dtype_of(network)}, which "
            "rounds logits differently; --evalmode dynamic makes one for the dtype it evaluates"
        )
