"""Policies: the thresholds at which images leave, the confidence they are compared with, and the file both live in.

    curve = read_policy(Path("save/demo/IMTA/policy.json"), network)
    predictor = AdaptivePredictor(network, curve.for_operations(5e6).policy)

A policy file is JSON: the fingerprint of the one network it belongs to, the confidence measure, the operations to each exit, and a list of
points, from cheap to full, with thresholds, held-out accuracy (percent) and mean operations each.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptive_inference.measures import MEASURES, RULES
from utils import UserError, atomic_write

FORMAT = "imta-msdnet policy 1"
LARGEST_FILE = 4 * 2**20  # bytes
MOST_EXITS, MOST_POINTS = 100, 10_000


class Answer(NamedTuple):
    """What an exit says of n images: ``classes`` (n,) int64, ``confidence`` (n,)."""

    classes: Tensor
    confidence: Tensor


def next_answer(measure: str, logits: Tensor, previous: Answer | None) -> Answer:
    """Class and confidence of the next exit; higher is more confident.

    Args:
        measure: ``softmax``, the largest probability (the paper); ``entropy``, 1 - H(probabilities) / log C; ``margin``, the largest
            probability less the second; ``patience``, how many exits in a row, this one included, agree (Zhou et al., "BERT Loses
            Patience", NeurIPS 2020, arXiv 2006.04152).
        logits: (n, C).
        previous: the exit before's answer to the same images, None at the first exit.
    """
    # Half precision would make many confidences equal.
    probs = torch.softmax(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, dim=1)
    largest, classes = probs.max(dim=1)
    if measure == "softmax":
        return Answer(classes, largest)
    if measure == "entropy":
        return Answer(classes, 1 + torch.special.xlogy(probs, probs).sum(dim=1) / math.log(max(probs.shape[1], 2)))
    if measure == "margin":
        if probs.shape[1] == 1:
            return Answer(classes, largest)
        best = probs.topk(2, dim=1).values
        return Answer(classes, best[:, 0] - best[:, 1])
    if measure == "patience":
        alone = torch.ones_like(largest)
        return Answer(classes, alone if previous is None else torch.where(classes == previous.classes, previous.confidence + 1, alone))
    raise ValueError(f"confidence is {measure!r}; allowed: {', '.join(MEASURES)}")


def confidence_by_exit(logits: Tensor, measure: str = "softmax") -> tuple[Tensor, Tensor]:
    """Logits (K, N, C) of every exit -> confidence (K, N) and class (K, N), int64."""
    answers, answer = [], None
    for exit_logits in logits:
        answer = next_answer(measure, exit_logits, answer)
        answers.append(answer)
    return torch.stack([a.confidence for a in answers]), torch.stack([a.classes for a in answers])


def confidence_and_answers(logits: Tensor, targets: Tensor, measure: str = "softmax") -> tuple[Tensor, Tensor]:
    """Logits (K, N, C) of every exit, class indices (N,) -> confidence (K, N), and whether the exit's class is right (K, N)."""
    confidence, classes = confidence_by_exit(logits, measure)
    return confidence, classes == targets


@dataclass(frozen=True)
class Policy:
    """When images leave: ``thresholds``, one an exit, compared with the measure ``confidence``.

    Raises:
        ValueError: no threshold, one that is not finite, or an unknown measure.
    """

    thresholds: tuple[float, ...]
    confidence: str = "softmax"

    def __post_init__(self):
        if not self.thresholds or not all(math.isfinite(t) for t in self.thresholds):
            raise ValueError(f"thresholds are {self.thresholds}; they must be one finite number an exit")
        if self.confidence not in MEASURES:
            raise ValueError(f"confidence is {self.confidence!r}; allowed: {', '.join(MEASURES)}")


@dataclass(frozen=True)
class Point:
    """A policy and what it reached on the held-out images: ``val_acc1`` in percent, mean ``operations``. ``rule`` says how its thresholds
    were found, ``p`` is its number on that rule's curve, counted from 1."""

    policy: Policy
    val_acc1: float
    operations: float
    rule: str = "geometric"
    p: int = 1


@dataclass(frozen=True)
class PolicyCurve:
    """The points of a network, from cheap to full. ``operations`` are those to each exit, as published counts go."""

    fingerprint: str
    network: str
    operations: tuple[float, ...]
    points: tuple[Point, ...]

    def for_operations(self, wanted: float, rule: str | None = None) -> Point:
        """The point with the best held-out accuracy among those whose mean cost is at most ``wanted`` operations.

        Args:
            rule: only points found by this rule; None: the optimised ones if there are any.

        Raises:
            UserError: every point costs more.
        """
        points = self.of_rule(rule)
        affordable = [point for point in points if point.operations <= wanted]
        if not affordable:
            least = min(point.operations for point in points)
            raise UserError(
                f"a budget of {wanted / 1e6:.2f} million operations is too small: the cheapest policy spends {least / 1e6:.2f} million "
                f"({100 * least / self.operations[-1]:.0f} % of the network)"
            )
        return max(affordable, key=lambda point: (point.val_acc1, -point.operations))

    def for_accuracy(self, wanted: float, rule: str | None = None) -> Point:
        """The cheapest point whose held-out accuracy is at least ``wanted`` percent.

        Raises:
            UserError: none reaches it.
        """
        points = self.of_rule(rule)
        good = [point for point in points if point.val_acc1 >= wanted]
        if not good:
            raise UserError(f"no policy reaches {wanted:g} % on the held-out images; the best has {max(p.val_acc1 for p in points):.2f} %")
        return min(good, key=lambda point: (point.operations, -point.val_acc1))

    def point(self, p: int, rule: str | None = None) -> Point:
        """Point number ``p``, from 1.

        Raises:
            UserError: there is no such point.
        """
        points = self.of_rule(rule)
        for point in points:
            if point.p == p:
                return point
        raise UserError(f"there is no point {p}; the policies are numbered {min(q.p for q in points)} to {max(q.p for q in points)}")

    def of_rule(self, rule: str | None) -> tuple[Point, ...]:
        """The points found by ``rule``; None: the optimised ones if there are any, else all.

        Raises:
            UserError: there is none.
        """
        points = tuple(point for point in self.points if point.rule == (rule or "optimised"))
        if not points and rule is not None:
            raise UserError(f"no policy here was found by the {rule} rule")
        return points or self.points


def network_fingerprint(network: nn.Module) -> str:
    """Digest of a network's description and weights: thresholds suit these weights only.

    The inference form of a network keeps the fingerprint of the network it was made from.
    """
    if hasattr(network, "fingerprint"):
        return network.fingerprint
    digest = hashlib.sha256(f"{describe(network)} {json.dumps(network.config, sort_keys=True)}".encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def describe(network: nn.Module) -> str:
    """A network in a few words, for messages."""
    return f"{type(network).__name__} with {network.num_exits} exits and {network.num_classes} classes"


def policy_curve(network: nn.Module, operations: list[int], rows: dict[str, list[dict]], confidence: str = "softmax") -> PolicyCurve:
    """The curve of ``network`` from rows of ``budgeted_curve`` or ``optimised_curve``, by rule.

    Args:
        operations: to each exit.
        rows: ``{"geometric": rows, "optimised": rows}``, or one of the two.
        confidence: the measure the thresholds are of.
    """
    points = [
        Point(Policy(tuple(row["thresholds"]), confidence), row["val_acc"], row["val_flops"], rule, row["p"])
        for rule, rule_rows in rows.items()
        for row in rule_rows
    ]
    return PolicyCurve(network_fingerprint(network), describe(network), tuple(operations), tuple(points))


def write_policy(path: Path, curve: PolicyCurve) -> None:
    """Write a policy file, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "network": {"description": curve.network, "fingerprint": curve.fingerprint},
        "confidence": curve.points[0].policy.confidence,
        "operations": list(curve.operations),
        "points": [],
    }
    for point in curve.points:
        row = {"thresholds": list(point.policy.thresholds), **asdict(point)}
        content["points"].append({name: value for name, value in row.items() if name != "policy"})
    with atomic_write(path) as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")


def read_policy(path: Path, network: nn.Module | None = None) -> PolicyCurve:
    """Read a policy file; nothing in it is trusted.

    Args:
        network: the network it must belong to, None to take the file as it is.

    Raises:
        UserError: one line: the file is missing, too large, damaged, or of another network.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(LARGEST_FILE + 1)
        if len(raw) > LARGEST_FILE:
            raise ValueError(f"it is larger than {LARGEST_FILE} bytes")
        curve = _parsed(json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant))
    except FileNotFoundError:
        raise UserError(f"there is no policy file {path}; --evalmode dynamic writes one") from None
    except OSError as error:
        raise UserError(f"cannot read the policy file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no policy file of this project: {_one_line(error)}") from None
    if network is not None and (len(curve.operations), curve.fingerprint) != (network.num_exits, network_fingerprint(network)):
        raise UserError(f"{path} is the policy of another network ({curve.network}); --evalmode dynamic makes one for this network")
    return curve


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, where a finite number belongs")


def _parsed(content: Any) -> PolicyCurve:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'its "format" is not "{FORMAT}"')
    network = _entry(content, "network", dict)
    confidence = _entry(content, "confidence", str)
    operations = _numbers(_entry(content, "operations", list), "operations")
    if not 1 <= len(operations) <= MOST_EXITS:
        raise ValueError(f"it has {len(operations)} exits, where 1 to {MOST_EXITS} are allowed")
    if operations[0] <= 0 or any(a > b for a, b in pairwise(operations)):
        raise ValueError("its operations do not grow from exit to exit")
    rows = _entry(content, "points", list)
    if not 1 <= len(rows) <= MOST_POINTS:
        raise ValueError(f"it has {len(rows)} points, where 1 to {MOST_POINTS} are allowed")
    points = []
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError("a point is not an object")
        thresholds = _numbers(_entry(row, "thresholds", list), "thresholds")
        if len(thresholds) != len(operations):
            raise ValueError(f"a point has {len(thresholds)} thresholds for {len(operations)} exits")
        val_acc1, mean = _numbers([row.get("val_acc1"), row.get("operations")], "val_acc1 and operations")
        if not 0 <= val_acc1 <= 100 or mean <= 0:
            raise ValueError("a point's val_acc1 or operations is out of range")
        rule, p = _entry(row, "rule", str), _entry(row, "p", int)
        if rule not in RULES:
            raise ValueError(f"a point's rule is none of {', '.join(RULES)}")
        points.append(Point(Policy(thresholds, confidence), val_acc1, mean, rule, p))
    return PolicyCurve(_entry(network, "fingerprint", str)[:64], _entry(network, "description", str)[:200], operations, tuple(points))


def _entry(content: dict, name: str, kind: type) -> Any:
    value = content.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f'its "{name}" is missing or of the wrong type')
    return value


def _numbers(values: list, name: str) -> tuple[float, ...]:
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) or not -1e300 < v < 1e300 for v in values):
        raise ValueError(f"{name} must be finite numbers")
    return tuple(float(v) for v in values)
