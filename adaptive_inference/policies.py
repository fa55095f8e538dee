"""Policies: the thresholds at which images leave, the measure they are compared with, and the file both live in.

    curve = read_policy(Path("save/demo/IMTA/policy.json"), network)
    predictor = AdaptivePredictor(network, choose(curve, operations=5e6).policy)

A policy file is JSON: fingerprints of the network and the form of it that it belongs to, the measure, the operations to each exit, the
temperature of each exit, the weights of an ensemble of exits, how promises about accuracy are tested, and a list of points from cheap to
full: thresholds, and what they reached on the held-out images.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptive_inference.measures import MEASURES, RULES
from adaptive_inference.promises.risk import CERTIFICATE, Losses, MaxLoss, certified
from models.options import NETWORK_FIELDS
from utils import UserError, atomic_write

if TYPE_CHECKING:
    from adaptive_inference.promises.timing import BlockTimes

FORMAT = "imta-msdnet policy 2"
MAX_FILE_SIZE = 4 * 2**20  # bytes


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
    probs = torch.softmax(
        logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, dim=1
    )
    largest, classes = probs.max(dim=1)
    if measure == "softmax":
        return Answer(classes, largest)
    if measure == "entropy":
        return Answer(
            classes, 1 + torch.special.xlogy(probs, probs).sum(dim=1) / math.log(max(probs.shape[1], 2))
        )
    if measure == "margin":
        best = probs.topk(2, dim=1).values
        return Answer(classes, best[:, 0] - best[:, 1])
    if measure == "patience":
        alone = torch.ones_like(largest)
        return Answer(
            classes,
            alone
            if previous is None
            else torch.where(classes == previous.classes, previous.confidence + 1, alone),
        )
    raise ValueError(f"measure is {measure!r}; allowed: {', '.join(MEASURES)}")


def confidence_by_exit(logits: Tensor, measure: str = "softmax") -> tuple[Tensor, Tensor]:
    """Logits (K, N, C) of every exit -> confidence (K, N) and class (K, N), int64."""
    answers, answer = [], None
    for exit_logits in logits:
        answer = next_answer(measure, exit_logits, answer)
        answers.append(answer)
    return torch.stack([a.confidence for a in answers]), torch.stack([a.classes for a in answers])


@dataclass(frozen=True)
class Policy:
    """When images leave, and how their answers are made.

    Args:
        thresholds: one an exit, compared with the measure of its logits.
        measure: as in ``next_answer``.
        temperatures: one an exit, by which its logits are divided before they become the probabilities of answers; None: 1 everywhere. Who
            leaves does not depend on them.
        ensemble: a row an exit, of a weight an exit: answers come from the sum, with these weights, of the logits of all exits so far.
            Who leaves is decided by the exit's own logits; temperatures are not used. None: each exit answers alone.

    Raises:
        ValueError: no threshold, one that is not finite, an unknown measure, or temperatures or weights that do not fit.
    """

    thresholds: tuple[float, ...]
    measure: str = "softmax"
    temperatures: tuple[float, ...] | None = None
    ensemble: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self):
        count = len(self.thresholds)
        if not self.thresholds or not all(map(math.isfinite, self.thresholds)):
            raise ValueError(f"thresholds are {self.thresholds}; they must be one finite number an exit")
        if self.measure not in MEASURES:
            raise ValueError(f"measure is {self.measure!r}; allowed: {', '.join(MEASURES)}")
        if self.temperatures is not None and not (
            len(self.temperatures) == count and min(self.temperatures) > 0
        ):
            raise ValueError(
                f"temperatures are {self.temperatures}; they must be one positive number an exit"
            )
        if self.ensemble is not None and [len(row) for row in self.ensemble] != [count] * count:
            raise ValueError(f"weights of an ensemble must be {count} rows of {count} numbers")

    @property
    def weights(self) -> tuple[tuple[float, ...], ...]:
        """Of the logits of all exits in the answers at each exit: those of the ensemble, else 1 / temperature of the exit alone."""
        alone = [1 / temperature for temperature in self.temperatures or [1.0] * len(self.thresholds)]
        return self.ensemble or tuple(
            tuple(x if j == k else 0.0 for j in range(len(alone))) for k, x in enumerate(alone)
        )


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

    def __post_init__(self):
        if (
            self.rule not in RULES
            or type(self.p) is not int
            or not 0 <= self.val_acc1 <= 100
            or self.operations <= 0
        ):
            raise ValueError("a point's rule, p, val_acc1 or operations are out of range")
        if (
            len(self.shares) != len(self.policy.thresholds)
            or min(self.shares) < 0
            or abs(sum(self.shares) - 1) > 1e-3
        ):
            raise ValueError("a point's shares are not one an exit, of one whole")
        if self.rule == "ensemble" and self.policy.ensemble is None:
            raise ValueError("the weights of its ensemble are missing")
        if self.rule == "tested" and not (
            self.losses and len(self.losses) == 2 and all(x.are_counts for x in self.losses)
        ):
            raise ValueError("a point's losses are no counts of two sets of images")


@dataclass(frozen=True)
class PolicyCurve:
    """The points of a network, from cheap to full. ``operations`` are those to each exit, as published counts go; ``form`` is that of
    ``form_of``."""

    fingerprint: str
    form: str
    network: str
    operations: tuple[float, ...]
    points: tuple[Point, ...]

    def __post_init__(self):
        if not all(isinstance(text, str) for text in (self.fingerprint, self.form, self.network)):
            raise ValueError("its network is not described in words")
        if list(self.operations) != sorted(self.operations) or min(self.operations, default=0) <= 0:
            raise ValueError("its operations do not grow from exit to exit")
        if not self.points or any(len(point.shares) != len(self.operations) for point in self.points):
            raise ValueError("it has no points, or one of another number of exits")

    def check(self, network: nn.Module, source: Path) -> None:
        """Hold the curve to the network and the form of it that will answer.

        Raises:
            UserError: it was made for another; ``source`` is named.
        """
        if (len(self.operations), self.fingerprint) != (network.num_exits, network_fingerprint(network)):
            raise UserError(
                f"{source} is the policy of another network ({self.network}); --evalmode dynamic makes one for this network"
            )
        if self.form != form_of(network):
            raise UserError(
                f"{source} was made for this network in {self.form}, not in {form_of(network)}, whose answers are rounded otherwise; "
                "--evalmode dynamic makes one for the form it evaluates"
            )

    def nearest(self, operations: float, rule: str | None = None) -> Point:
        """The point whose mean operations are nearest to ``operations``."""
        return min(
            self.of_rule(rule), key=lambda point: (abs(point.operations - operations), -point.val_acc1)
        )

    def of_rule(self, rule: str | None) -> tuple[Point, ...]:
        """The points found by ``rule``; None: the best there are, those of an ensemble before optimised ones before others.

        Raises:
            UserError: there is none.
        """
        for name in (rule,) if rule else ("ensemble", "optimised"):
            if points := tuple(point for point in self.points if point.rule == name):
                return points
        if rule:
            raise UserError(
                f"no policy here is of the rule {rule}; there are {', '.join(sorted({point.rule for point in self.points}))}"
            )
        return self.points


def choose(
    curve: PolicyCurve,
    operations: float | None = None,
    milliseconds: float | None = None,
    accuracy: float | None = None,
    max_loss: MaxLoss | float | None = None,
    timing: "BlockTimes | None" = None,
    rule: str | None = None,
) -> Point:
    """The point that grants all that is asked for: within a budget the most accurate on held-out images, without one the cheapest.

    Args:
        operations: an image, the mean at most.
        milliseconds: an image, the mean at most, as ``timing`` expects it (``predictor.BudgetPredictor`` keeps to it as measured).
        accuracy, max_loss, rule: as for ``allowed_points``.
        timing: of this network on this machine, from ``timing.measure_blocks``.

    Raises:
        UserError: no point does; the line says what is possible.
        ValueError: ``milliseconds`` without ``timing``.
    """
    if milliseconds is not None and timing is None:
        raise ValueError("a budget of milliseconds needs timing, which timing.measure_blocks measures")
    points = allowed_points(curve, accuracy, max_loss, rule)
    if operations is not None:
        points = within(
            points,
            [point.operations / 1e6 for point in points],
            operations / 1e6,
            "M",
            curve.operations[-1] / 1e6,
        )
    if milliseconds is not None:
        points = within(points, [timing.milliseconds(point.shares) for point in points], milliseconds, "ms")
    if operations is None and milliseconds is None:
        return min(points, key=lambda point: (point.operations, -point.val_acc1))
    return max(points, key=lambda point: (point.val_acc1, -point.operations))


def allowed_points(
    curve: PolicyCurve,
    accuracy: float | None = None,
    max_loss: MaxLoss | float | None = None,
    rule: str | None = None,
) -> list[Point]:
    """The points that grant what is asked for.

    Args:
        accuracy: on held-out images at least, in percent.
        max_loss: of accuracy against the full network, with a level of confidence; a number is in percent, at the usual level.
        rule: only points found by this rule; None: as for ``PolicyCurve.of_rule``. ``max_loss`` has a rule of its own.

    Raises:
        UserError: no point does; the line says what is possible.
        ValueError: ``max_loss`` with a ``rule``, or out of range.
    """
    if max_loss is not None and rule is not None:
        raise ValueError(f"max_loss has a rule of its own, tested; {rule} promises nothing")
    max_loss = MaxLoss(max_loss) if isinstance(max_loss, (int, float)) else max_loss
    points = list(curve.of_rule(rule)) if max_loss is None else certified(curve.points, max_loss)
    reached = [point for point in points if accuracy is None or point.val_acc1 >= accuracy]
    if not reached:
        best = max(point.val_acc1 for point in points)
        limited = " that is certain to lose so little" if max_loss else ""
        raise UserError(
            f"no policy{limited} reaches {accuracy:g} % on the held-out images; the best has {best:.2f} %"
        )
    return reached


def within(
    points: Sequence[Point], costs: Sequence[float], limit: float, unit: str, whole: float | None = None
) -> list[Point]:
    """The points whose cost is at most ``limit``.

    Args:
        whole: the cost of the whole network, to name a share of it.

    Raises:
        UserError: all cost more; the line says what to ask for.
    """
    cheapest = min(costs)
    if cheapest > limit:
        percent = "" if whole is None else f" or {math.ceil(100 * cheapest / whole)}%"
        raise UserError(
            f"a budget of {limit:.4g}{unit} is too small here: the cheapest policy allowed needs {cheapest:.4g}{unit}; "
            f"ask for {_rounded_up(cheapest)}{unit}{percent}"
        )
    return [point for point, cost in zip(points, costs, strict=True) if cost <= limit]


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
    digest = hashlib.sha256(
        f"{describe(network)} {json.dumps(_chosen(network.config), sort_keys=True)}".encode()
    )
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _chosen(config: dict[str, Any]) -> dict[str, Any]:
    """Without options of a network at their defaults: an option that comes later then changes no fingerprint."""
    defaults = {name: described.default for name, described in NETWORK_FIELDS.items()}
    chosen = {name: _chosen(value) if isinstance(value, dict) else value for name, value in config.items()}
    return {name: value for name, value in chosen.items() if name not in defaults or value != defaults[name]}


def form_of(network: nn.Module) -> str:
    """What decides how a network's answers are rounded: ``float32``, ``bfloat16``, ``float16`` or ``float64``."""
    return str(next(network.parameters()).dtype).removeprefix("torch.")


def describe(network: nn.Module) -> str:
    """A network in a few words, for messages."""
    return f"{network.kind} with {network.num_exits} exits and {network.num_classes} classes"


def policy_curve(
    network: nn.Module,
    operations: list[int],
    rows: dict[str, list[dict]],
    measure: str = "softmax",
    temperatures: Sequence[float] | None = None,
    ensemble: Sequence[Sequence[float]] | None = None,
) -> PolicyCurve:
    """The curve of ``network`` from rows by rule.

    Args:
        network: in the form that gave the logits.
        operations: to each exit.
        rows: by rule: ``geometric`` and ``optimised`` of ``curve_rows``, ``tested`` of ``risk.rows_with_losses``, ``ensemble`` of
            ``curve_rows`` with the ensemble's answers; or some of these.
        measure: the one the thresholds are of.
        temperatures, ensemble: as for ``Policy``; the ensemble answers at the points of its rule alone.
    """
    fixed = (measure, temperatures and tuple(temperatures))
    weights = ensemble and tuple(map(tuple, ensemble))
    points = [
        Point(
            Policy(tuple(row["thresholds"]), *fixed, weights if rule == "ensemble" else None),
            *(
                row["val_acc1"],
                row["val_operations"],
                tuple(row["val_shares"]),
                rule,
                row["p"],
                row.get("losses"),
            ),
        )
        for rule, rule_rows in rows.items()
        for row in rule_rows
    ]
    return PolicyCurve(
        network_fingerprint(network), form_of(network), describe(network), tuple(operations), tuple(points)
    )


def write_policy(path: Path, curve: PolicyCurve) -> None:
    """Write a policy file, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    policies = [point.policy for point in curve.points]
    content = {
        "format": FORMAT,
        "network": {"description": curve.network, "fingerprint": curve.fingerprint, "form": curve.form},
        "measure": policies[0].measure,
        "temperatures": policies[0].temperatures,
        "ensemble": next((policy.ensemble for policy in policies if policy.ensemble), None),
        "operations": curve.operations,
        "certificate": CERTIFICATE if any(point.rule == "tested" for point in curve.points) else None,
        "points": [],
    }
    for point in curve.points:
        row = {"thresholds": point.policy.thresholds, **asdict(point)}
        content["points"].append(
            {name: value for name, value in row.items() if name != "policy" and value is not None}
        )
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
        curve = _parsed(json.loads(raw.decode("utf-8")))
    except FileNotFoundError:
        raise UserError(f"there is no policy file {path}; --evalmode dynamic writes one") from None
    except OSError as error:
        raise UserError(f"cannot read the policy file {path}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)[:200]
        raise UserError(f"{path} is no policy file of this project: {reason}") from None
    if network is not None:
        curve.check(network, path)
    return curve


def _parsed(content: Any) -> PolicyCurve:
    if content["format"] != FORMAT:
        raise ValueError(f'its "format" is not "{FORMAT}"')
    temperatures, ensemble = content.get("temperatures"), content.get("ensemble")
    temperatures = None if temperatures is None else _numbers(temperatures)
    ensemble = None if ensemble is None else tuple(map(_numbers, ensemble))
    points = []
    for row in content["points"]:
        rule, results = row["rule"], _numbers([row["val_acc1"], row["operations"]])
        policy = Policy(
            _numbers(row["thresholds"]),
            content["measure"],
            temperatures,
            ensemble if rule == "ensemble" else None,
        )
        losses = tuple(Losses(*counts) for counts in row["losses"]) if rule == "tested" else None
        points.append(Point(policy, *results, _numbers(row["shares"]), rule, row["p"], losses))
    if any(point.rule == "tested" for point in points) and content.get("certificate") != CERTIFICATE:
        raise ValueError("its certificate is of another procedure than this version's")
    network = content["network"]
    return PolicyCurve(
        network["fingerprint"],
        network["form"],
        network["description"],
        _numbers(content["operations"]),
        tuple(points),
    )


def _numbers(values: Any) -> tuple[float, ...]:
    if not all(type(value) in (int, float) and -1e300 < value < 1e300 for value in values):
        raise ValueError("where numbers belong, there are others than finite ones")
    return tuple(map(float, values))
