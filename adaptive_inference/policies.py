"""Policies: the thresholds at which images leave, the measure they are compared with, and the file both live in.

    curve = read_policy(Path("save/demo/IMTA/policy.json"), network)
    predictor = AdaptivePredictor(network, choose(curve, operations=5e6).policy)

A policy file is JSON: fingerprints of the network and the form of it that it belongs to, the measure, the operations to each exit, the
temperature of each exit, how promises about accuracy are tested, and a list of points from cheap to full: thresholds, and what they reached
on the held-out images.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptive_inference.measures import MEASURES, RULES
from adaptive_inference.risk import CERTIFICATE, Losses, MaxLoss, certified
from utils import UserError, atomic_write

if TYPE_CHECKING:
    from adaptive_inference.timing import BlockTimes

FORMAT = "imta-msdnet policy 2"
MAX_FILE_SIZE = 4 * 2**20  # bytes
MAX_EXITS, MAX_POINTS = 100, 10_000


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
    raise ValueError(f"measure is {measure!r}; allowed: {', '.join(MEASURES)}")


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
    """When images leave, and how sure their answers are.

    Args:
        thresholds: one an exit, compared with the measure of its logits.
        measure: as in ``next_answer``.
        temperatures: one an exit, by which logits are divided before they become the probabilities of answers; None: 1 everywhere. Who
            leaves does not depend on them.

    Raises:
        ValueError: no threshold, one that is not finite, an unknown measure, or temperatures that do not fit.
    """

    thresholds: tuple[float, ...]
    measure: str = "softmax"
    temperatures: tuple[float, ...] | None = None

    def __post_init__(self):
        if not self.thresholds or not all(math.isfinite(t) for t in self.thresholds):
            raise ValueError(f"thresholds are {self.thresholds}; they must be one finite number an exit")
        if self.measure not in MEASURES:
            raise ValueError(f"measure is {self.measure!r}; allowed: {', '.join(MEASURES)}")
        if self.temperatures is not None and not (len(self.temperatures) == len(self.thresholds) and min(self.temperatures) > 0):
            raise ValueError(f"temperatures are {self.temperatures}; they must be one positive number an exit")


@dataclass(frozen=True)
class Point:
    """A policy and what it reached on held-out images.

    Args:
        val_acc1: in percent.
        operations: mean.
        shares: of the images, that leave at each exit.
        rule: how its thresholds were found, ``p`` its number on that rule's curve, from 1.
        losses: of the rule "tested": on the images that set the thresholds, and on the others.
    """

    policy: Policy
    val_acc1: float
    operations: float
    shares: tuple[float, ...]
    rule: str = "geometric"
    p: int = 1
    losses: tuple[Losses, Losses] | None = None


@dataclass(frozen=True)
class PolicyCurve:
    """The points of a network, from cheap to full. ``operations`` are those to each exit, as published counts go; ``form`` is that of
    ``form_of``."""

    fingerprint: str
    form: str
    network: str
    operations: tuple[float, ...]
    points: tuple[Point, ...]

    def check(self, network: nn.Module, source: Path) -> None:
        """Hold the curve to the network and the form of it that will answer.

        Raises:
            UserError: it was made for another; ``source`` is named.
        """
        if (len(self.operations), self.fingerprint) != (network.num_exits, network_fingerprint(network)):
            raise UserError(f"{source} is the policy of another network ({self.network}); --evalmode dynamic makes one for this network")
        if self.form != form_of(network):
            raise UserError(
                f"{source} was made for this network in {self.form}, not in {form_of(network)}, whose answers are rounded otherwise; "
                "--evalmode dynamic makes one for the form it evaluates"
            )

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

    def nearest(self, operations: float, rule: str | None = None) -> Point:
        """The point whose mean operations are nearest to ``operations``."""
        return min(self.of_rule(rule), key=lambda point: (abs(point.operations - operations), -point.val_acc1))

    def of_rule(self, rule: str | None) -> tuple[Point, ...]:
        """The points found by ``rule``; None: the optimised ones if there are any, else all.

        Raises:
            UserError: there is none.
        """
        points = tuple(point for point in self.points if point.rule == (rule or "optimised"))
        if not points and rule is not None:
            raise UserError(f"no policy here was found by the {rule} rule")
        return points or self.points


def choose(
    curve: PolicyCurve,
    operations: float | None = None,
    milliseconds: float | None = None,
    accuracy: float | None = None,
    max_loss: MaxLoss | None = None,
    timing: "BlockTimes | None" = None,
    rule: str | None = None,
) -> Point:
    """The point that grants all that is asked for: within a budget the most accurate on held-out images, without one the cheapest.

    Args:
        operations: an image, the mean at most.
        milliseconds: an image, the mean at most, as ``timing`` expects it.
        accuracy: on held-out images at least, in percent.
        max_loss: of accuracy against the full network, with a level of confidence.
        timing: of this network on this machine, from ``timing.measure_blocks``.
        rule: only points found by this rule; None: the optimised ones if there are any. ``max_loss`` has a rule of its own.

    Raises:
        UserError: no point does; the line says what is possible.
        ValueError: ``milliseconds`` without ``timing``.
    """
    points = list(curve.of_rule(rule)) if max_loss is None else certified(curve.points, max_loss)
    full = curve.operations[-1]
    if operations is not None:
        cheapest = min(point.operations for point in points)
        points = [point for point in points if point.operations <= operations]
        if not points:
            raise UserError(
                f"a budget of {operations / 1e6:.2f} million operations is too small: the cheapest policy{_of(max_loss)} spends "
                f"{cheapest / 1e6:.2f} million; ask for {math.ceil(cheapest / 1e4) / 100:.2f}M or {math.ceil(100 * cheapest / full)}%"
            )
    if milliseconds is not None:
        if timing is None:
            raise ValueError("a budget of milliseconds needs timing, which timing.measure_blocks measures")
        costs = [timing.milliseconds(point.shares) for point in points]
        points = [point for point, cost in zip(points, costs, strict=True) if cost <= milliseconds]
        if not points:
            raise UserError(
                f"a budget of {milliseconds:g} ms is too small here: the cheapest policy{_of(max_loss)} takes {min(costs):.3g} ms "
                f"an image; ask for {_rounded_up(min(costs))}ms"
            )
    if accuracy is not None:
        best = max(point.val_acc1 for point in points)
        points = [point for point in points if point.val_acc1 >= accuracy]
        if not points:
            limited = max_loss is not None or operations is not None or milliseconds is not None
            raise UserError(
                f"no policy{' within the other limits' if limited else ''} reaches {accuracy:g} % on the held-out images; "
                f"the best has {best:.2f} %"
            )
    if operations is None and milliseconds is None:
        return min(points, key=lambda point: (point.operations, -point.val_acc1))
    return max(points, key=lambda point: (point.val_acc1, -point.operations))


def _of(max_loss: MaxLoss | None) -> str:
    return "" if max_loss is None else " that is certain to lose so little"


def _rounded_up(value: float) -> str:
    """Three digits, not below ``value``."""
    step = 10 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / step) * step:.6g}"


def network_fingerprint(network: nn.Module) -> str:
    """Digest of a network's description and weights: thresholds suit these weights only.

    The inference form of a network, in PyTorch or in ONNX, keeps the fingerprint of the network it was made from.
    """
    if network.fingerprint is not None:
        return network.fingerprint
    digest = hashlib.sha256(f"{describe(network)} {json.dumps(network.config, sort_keys=True)}".encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def form_of(network: nn.Module) -> str:
    """What decides how a network's answers are rounded: ``float32``, ``bfloat16``, ``float16`` or ``float64``."""
    return str(next(network.parameters()).dtype).removeprefix("torch.")


def describe(network: nn.Module) -> str:
    """A network in a few words, for messages."""
    return f"{type(network).__name__} with {network.num_exits} exits and {network.num_classes} classes"


def policy_curve(
    network: nn.Module,
    operations: list[int],
    rows: dict[str, list[dict]],
    measure: str = "softmax",
    temperatures: list[float] | None = None,
) -> PolicyCurve:
    """The curve of ``network`` from rows by rule.

    Args:
        network: in the form that gave the logits.
        operations: to each exit.
        rows: by rule: ``geometric`` of ``budgeted_curve``, ``optimised`` of ``optimised_curve``, ``tested`` of ``risk.rows_with_losses``;
            or some of these.
        measure: the one the thresholds are of.
        temperatures: as for ``Policy``.
    """
    fixed = (measure, tuple(temperatures) if temperatures is not None else None)
    points = [
        Point(
            Policy(tuple(row["thresholds"]), *fixed),
            *(row["val_acc1"], row["val_operations"], tuple(row["val_shares"]), rule, row["p"], row.get("losses")),
        )
        for rule, rule_rows in rows.items()
        for row in rule_rows
    ]
    return PolicyCurve(network_fingerprint(network), form_of(network), describe(network), tuple(operations), tuple(points))


def write_policy(path: Path, curve: PolicyCurve) -> None:
    """Write a policy file, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    policy = curve.points[0].policy
    content = {
        "format": FORMAT,
        "network": {"description": curve.network, "fingerprint": curve.fingerprint, "form": curve.form},
        "measure": policy.measure,
        "temperatures": policy.temperatures,
        "operations": curve.operations,
        "certificate": CERTIFICATE,
        "points": [],
    }
    for point in curve.points:
        row = {"thresholds": point.policy.thresholds, **asdict(point)}
        content["points"].append({name: value for name, value in row.items() if name != "policy" and value is not None})
    with atomic_write(path) as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")


def read_policy(path: str | Path, network: nn.Module | None = None) -> PolicyCurve:
    """Read a policy file; nothing in it is trusted.

    Args:
        network: the network it must belong to, None to take the file as it is.

    Raises:
        UserError: one line: the file is missing, too large, damaged, or of another network or form.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_SIZE + 1)
        if len(raw) > MAX_FILE_SIZE:
            raise ValueError(f"it is larger than {MAX_FILE_SIZE} bytes")
        curve = _parsed(json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant))
    except FileNotFoundError:
        raise UserError(f"there is no policy file {path}; --evalmode dynamic writes one") from None
    except OSError as error:
        raise UserError(f"cannot read the policy file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no policy file of this project: {_one_line(error)}") from None
    if network is not None:
        curve.check(network, path)
    return curve


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, where a finite number belongs")


def _parsed(content: Any) -> PolicyCurve:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'its "format" is not "{FORMAT}"')
    network = _entry(content, "network", dict)
    measure = _entry(content, "measure", str)
    temperatures = content.get("temperatures")
    if temperatures is not None:
        temperatures = _numbers(_entry(content, "temperatures", list), "temperatures")
    operations = _numbers(_entry(content, "operations", list), "operations")
    if not 1 <= len(operations) <= MAX_EXITS:
        raise ValueError(f"it has {len(operations)} exits, where 1 to {MAX_EXITS} are allowed")
    if operations[0] <= 0 or any(a > b for a, b in pairwise(operations)):
        raise ValueError("its operations do not grow from exit to exit")
    rows = _entry(content, "points", list)
    if not 1 <= len(rows) <= MAX_POINTS:
        raise ValueError(f"it has {len(rows)} points, where 1 to {MAX_POINTS} are allowed")
    points = []
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError("a point is not an object")
        thresholds, shares = (_numbers(_entry(row, name, list), name) for name in ("thresholds", "shares"))
        if not len(thresholds) == len(shares) == len(operations):
            raise ValueError(f"a point has {len(thresholds)} thresholds and {len(shares)} shares for {len(operations)} exits")
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-3:
            raise ValueError("a point's shares are not of one whole")
        val_acc1, mean = _numbers([row.get("val_acc1"), row.get("operations")], "val_acc1 and operations")
        if not 0 <= val_acc1 <= 100 or mean <= 0:
            raise ValueError("a point's val_acc1 or operations is out of range")
        rule, p = _entry(row, "rule", str), _entry(row, "p", int)
        if rule not in RULES:
            raise ValueError(f"a point's rule is none of {', '.join(RULES)}")
        losses = _losses(_entry(row, "losses", list)) if rule == "tested" else None
        points.append(Point(Policy(thresholds, measure, temperatures), val_acc1, mean, shares, rule, p, losses))
    names = [_entry(network, "fingerprint", str)[:64], _entry(network, "form", str)[:64], _entry(network, "description", str)[:200]]
    return PolicyCurve(*names, operations, tuple(points))


def _losses(parts: list) -> tuple[Losses, Losses]:
    for counts in parts:
        if not isinstance(counts, list) or len(counts) != 4 or any(type(n) is not int for n in counts):
            raise ValueError("a point's losses are not four whole numbers")
        images, worse, better, other = counts
        if not (0 < images <= 10**9 and min(worse, better, other) >= 0 and worse + better <= other <= images):
            raise ValueError("a point's losses are out of range")
    if len(parts) != 2:
        raise ValueError("a point's losses are not of two sets of images")
    return tuple(Losses(*counts) for counts in parts)


def _entry(content: dict, name: str, kind: type) -> Any:
    value = content.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f'its "{name}" is missing or of the wrong type')
    return value


def _numbers(values: list, name: str) -> tuple[float, ...]:
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) or not -1e300 < v < 1e300 for v in values):
        raise ValueError(f"{name} must be finite numbers")
    return tuple(float(v) for v in values)
