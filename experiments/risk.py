"""Measure how often promises about accuracy fail, how many policies they allow, and what they save.

    python -m experiments.risk simulate    # counts drawn with known probabilities
    python -m experiments.risk saved imta_cifar100 --data-root DIR    # limits of 0.5, 1 and 2 points
    python -m experiments.risk resample imta_cifar100 --data-root DIR    # the whole procedure, known truth

``simulate`` draws the losses of a policy exactly at the limit, one standard error beyond it, and below it,
and prints how often the test of ``adaptive_inference.promises.risk`` certifies it, and how often it would in
endless trials, from the distribution of the counts. Beside it stand two other tests: one that knows the
variance of the loss, which nobody does, and the betting bound of Waudby-Smith and Ramdas (2024, arXiv
2010.09686) with a fixed stake. ``resample`` takes the test images as the whole
population: held-out images are drawn from them with replacement, temperatures and ensemble are fitted, the
policies are tested, and the loss of the cheapest certified one on the population is its true one.
"""

import os

# Before PyTorch loads; train_GE.py says why.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import math
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptive_inference.budgeted import ExitPredictions, geometric_thresholds
from adaptive_inference.calibration import with_ensemble
from adaptive_inference.confidence import NONE_LEAVE
from adaptive_inference.finding import fit_full_policy
from adaptive_inference.fold import fold
from adaptive_inference.policies import LossCounts, Point
from adaptive_inference.promises.risk import (
    CONFIDENCE_PERCENT,
    MaxLoss,
    certified,
    certified_points,
    count_losses,
    learning_images,
    p_value,
)
from engine.checkpoint import load_saved
from engine.collect import collect_logits
from engine.report import table
from engine.runtime.distributed import Processes
from experiments.network_data import load_own_data
from models import count_operations
from models.files import find
from parsing import CommandLineParser, user_path
from utils import UserError, print_error

ALONE = Processes(0, 1, torch.device("cpu"), ())
LEVELS = (90.0, 95.0, 99.0)
LIMITS = (0.5, 1.0, 2.0)  # percent
# Share of the images on which a simulated policy is right and the full network wrong; none where every other
# prediction counts as a loss.
BETTER = {"accuracy": 0.02, "disagreement": 0.0}
DISTANCES = (-1.0, 0.0, 1.65, 2.5, 3.5)  # standard errors from the loss to the limit


def main(argv: list[str] | None = None) -> int:
    """Print the tables that the arguments ask for (those of the process if None); return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run_command(arguments)
    except (UserError, OSError, ValueError) as error:
        print_error(f"experiments.risk: {error}")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandLineParser(prog="experiments.risk", description="Tests of promises about accuracy.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands_of = {
        "simulate": (simulate, "violations and power, from drawn losses"),
        "saved": (saved, "operations that certified policies need"),
        "resample": (resample, "violations of the whole procedure, from drawn images"),
    }
    for name, (function, text) in commands_of.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run_command=function)
        if name != "saved":
            command.add_argument(
                "--trials", type=int, default=2000, metavar="N", help="(default: %(default)s)"
            )
        if name == "simulate":
            command.add_argument(
                "--images",
                type=int,
                default=4500,
                metavar="N",
                help="that test the policy (default: %(default)s)",
            )
            command.add_argument(
                "--max-loss", type=float, default=1.0, metavar="PERCENT", help="(default: %(default)s)"
            )
        else:
            command.add_argument("network", metavar="NETWORK", help="a run, a file or a name in weights/")
            command.add_argument(
                "--data-root", type=user_path, metavar="DIR", help="(default: that of the run)"
            )
    return parser


def simulate(arguments: argparse.Namespace) -> None:
    """Print how often a simulated policy is certified, by the distance of its loss from the limit."""
    for loss, better in BETTER.items():
        rows, limit = [], arguments.max_loss / 100
        generator = np.random.default_rng(0)
        boundaries = {
            level: Boundary(arguments.images, limit, level, loss == "disagreement") for level in LEVELS
        }
        for distance in DISTANCES:
            truth = at_distance(limit, better, arguments.images, distance)
            draws = _draw(arguments.images, truth, better, arguments.trials, generator)
            learned = _draw(arguments.images // 9, truth, better, arguments.trials, generator)
            exact = {level: boundaries[level].chance_below(truth, better) for level in LEVELS}
            rows += _certified_rows(draws, learned, limit, loss, distance, exact)
        title = f"loss of {loss}, limit {arguments.max_loss:g} %, {arguments.images:,} images"
        sys.stdout.write(f"\n{title}, {arguments.trials:,} trials\n{table(rows, list(rows[0]))}\n")


def at_distance(limit: float, better: float, images: int, distance: float) -> float:
    """Return the share of worse images whose loss is ``distance`` of its standard errors below the limit."""
    low, high = 0.0, 1 - better
    for _ in range(60):
        worse = (low + high) / 2
        loss = worse - better
        error = math.sqrt((worse + better - loss**2) / images)
        low, high = (worse, high) if loss + distance * error < limit else (low, worse)
    return low


def _draw(
    images: int, worse: float, better: float, trials: int, generator: np.random.Generator
) -> list[LossCounts]:
    counts = generator.multinomial(images, [worse, better, 1 - worse - better], trials).tolist()
    return [LossCounts(images, up, down, up + down) for up, down, _ in counts]


class Boundary:
    """The counts with which a test certifies: by the number of changed images, the most that may be worse.

    Args:
        images: Number of images that test a policy.
        limit: Limit on the loss, as a share.
        level: Confidence level, in percent.
        disagreement: Whether every changed image counts as worse.
    """

    def __init__(self, images: int, limit: float, level: float, disagreement: bool):
        self.images, self.limit, self.allowed = images, limit, 1 - level / 100
        self.disagreement = disagreement
        self._most: dict[int, int] = {}

    def most_worse(self, changed: int) -> int:
        """Return the largest certified count of worse images among ``changed`` ones; -1: none is."""
        if changed not in self._most:
            low, high = -1, changed
            while low < high:
                middle = (low + high + 1) // 2
                losses = LossCounts(self.images, middle, changed - middle, changed)
                is_certain = p_value(losses, self.limit, self.disagreement) <= self.allowed
                low, high = (middle, high) if is_certain else (low, middle - 1)
            self._most[changed] = low
        return self._most[changed]

    def chance_below(self, worse: float, better: float) -> float:
        """Return the probability of a certificate where these are the probabilities of a changed image."""
        changed = worse + better
        deviation = math.sqrt(self.images * changed * (1 - changed))
        first, last = (round(self.images * changed + sign * 6 * deviation) for sign in (-1, 1))
        return sum(
            _binomial(self.images, changed, torch.tensor([total])).item()
            * _binomial(total, worse / changed, torch.arange(self.most_worse(total) + 1)).sum().item()
            for total in range(max(first, 0), min(last, self.images) + 1)
        )


def _binomial(trials: int, chance: float, counts: Tensor) -> Tensor:
    """Return the probabilities of these counts, (N,) float64."""
    counts, chances = counts.double(), torch.tensor([chance, 1 - chance], dtype=torch.float64)
    logs = math.lgamma(trials + 1) - torch.lgamma(counts + 1) - torch.lgamma(trials - counts + 1)
    return (logs + torch.xlogy(counts, chances[0]) + torch.xlogy(trials - counts, chances[1])).exp()


def _certified_rows(
    draws: list[LossCounts],
    learned: list[LossCounts],
    limit: float,
    loss: str,
    distance: float,
    exact: dict[float, float],
) -> list[dict]:
    """Return one row per level: how often each test certifies the policy."""
    disagreement = loss == "disagreement"
    values = [p_value(losses, limit, disagreement) for losses in draws]
    rows = []
    for level in LEVELS:
        pairs = zip(learned, draws, strict=True)
        bets = [betting_bound(*pair, MaxLoss(100 * limit, level, disagreement)) for pair in pairs]
        known = 0.5 * math.erfc((_normal_quantile(level / 100) - distance) / math.sqrt(2))
        rows.append(
            {
                "errors below the limit": f"{distance:g}",
                "level %": f"{level:g}",
                "certified %": _share(sum(value <= 1 - level / 100 for value in values), len(values)),
                "in endless trials %": f"{100 * exact[level]:.2f}",
                "variance known %": f"{100 * known:.1f}",
                "betting %": _share(sum(bets), len(bets)),
            }
        )
    return rows


def _share(count: int, trials: int) -> str:
    share = count / trials
    return f"{100 * share:.1f} +- {100 * math.sqrt(share * (1 - share) / trials):.1f}"


def _share_broken(count: int, trials: int) -> str:
    """Return ``_share``; for none, where a standard error says nothing, the most at 95 % confidence."""
    return _share(count, trials) if count else f"0 (at most {100 * (1 - 0.05 ** (1 / trials)):.1f})"


def _normal_quantile(level: float) -> float:
    return float(torch.special.ndtri(torch.tensor(level, dtype=torch.float64)))


def betting_bound(learned: LossCounts, tested: LossCounts, wanted: MaxLoss) -> bool:
    """Return whether a bettor against a loss above the limit grows rich; other images fix the stake."""
    limit, needed = wanted.percent / 100, -math.log1p(-wanted.level / 100)
    (known_up, known_down), (up, down) = (
        (x.other, 0) if wanted.disagreement else (x.worse, x.better) for x in (learned, tested)
    )
    variance = (known_up + known_down + 1) / (learned.images + 1)
    stake = min(math.sqrt(2 * needed / (tested.images * variance)), 0.9 / (1 - limit))
    counts = {1: up, -1: down, 0: tested.images - up - down}
    return sum(count * math.log1p(stake * (limit - loss)) for loss, count in counts.items()) >= needed


class Evaluated(NamedTuple):
    """What a network predicts for held-out and test images.

    Attributes:
        val: Logits (K, N, C) of the held-out images, and their targets (N,).
        test: Those of the test images.
        operations: Operations to each exit.
    """

    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    operations: list[int]


def evaluate(network: str, data_root: Path | None) -> Evaluated:
    """Run a network on the held-out images of its own split and on the test images.

    Raises:
        UserError: The network or its images cannot be read.
    """
    loaded = load_saved(find(network))
    data = load_own_data(loaded, data_root, "dynamic")
    folded = fold(loaded.network)
    val, test = (collect_logits(folded, part, ALONE) for part in (data.val, data.test))
    return Evaluated(val, test, count_operations(loaded.network, data.info.image_size))


def saved(arguments: argparse.Namespace) -> None:
    """Print what the cheapest certified policies cost and lose on test images."""
    evaluated = evaluate(arguments.network, arguments.data_root)
    policy = fit_full_policy(*evaluated.val)
    (val, operations), (test, _) = (
        with_ensemble(ExitPredictions.from_logits(*part), part[0], policy.ensemble, evaluated.operations)
        for part in (evaluated.val, evaluated.test)
    )
    points = certified_points(val, policy, operations)
    learning = val.subset(learning_images(len(val.targets)))
    rows = []
    for disagreement in (False, True):
        for limit in LIMITS:
            wanted = MaxLoss(limit, CONFIDENCE_PERCENT, disagreement)
            point = certified(points, wanted)[-1]
            bet = _certified_by_bets(points, learning, wanted)[-1]
            losses = count_losses(_thresholds(point, test), test)
            rows.append(
                {
                    "promise": str(wanted),
                    "operations %": f"{100 * point.operations / operations[-1]:.1f}",
                    "by betting: operations %": f"{100 * bet.operations / operations[-1]:.1f}",
                    "policy": f"{point.number} of {len(points)}",
                    "lost on test images %": f"{_percent_lost(losses, wanted):.2f}",
                }
            )
    full = 100 * float(test.correct[-1].double().mean())
    sys.stdout.write(
        f"{arguments.network}: {points[0].losses.images:,} held-out images test {len(points)} policies; full "
        f"network {full:.2f} % of {len(test.targets):,} test images\n{table(rows, list(rows[0]))}\n"
    )


def _certified_by_bets(points: Sequence[Point], learning: ExitPredictions, wanted: MaxLoss) -> list[Point]:
    """Return the points that the betting bound certifies, from the full network to the cheapest."""

    def is_certain(point: Point) -> bool:
        learned = count_losses(_thresholds(point, learning), learning)
        return point.policy.runs_everything or betting_bound(learned, point.losses, wanted)

    return list(takewhile(is_certain, sorted(points, key=lambda point: -point.number)))


def _thresholds(point: Point, predictions: ExitPredictions) -> Tensor:
    return torch.tensor(point.policy.thresholds, dtype=predictions.confidence.dtype)


def _percent_lost(losses: LossCounts, wanted: MaxLoss) -> float:
    return 100 * (losses.other if wanted.disagreement else losses.worse - losses.better) / losses.images


def usual_choice(held: ExitPredictions, wanted: MaxLoss) -> Tensor:
    """Return the thresholds of the cheapest policy that lost no more on the same images, without any test."""
    for thresholds in geometric_thresholds(held.confidence):
        if _percent_lost(count_losses(thresholds, held), wanted) <= wanted.percent:
            return thresholds
    return held.confidence.new_full((len(held.confidence),), NONE_LEAVE)


def resample(arguments: argparse.Namespace) -> None:
    """Print how often the cheapest certified policy loses more than promised."""
    evaluated = evaluate(arguments.network, arguments.data_root)
    (logits, targets), count = evaluated.test, len(evaluated.val[1])
    exits_alone = ExitPredictions.from_logits(logits, targets)
    generator = torch.Generator().manual_seed(0)
    promises = [MaxLoss(1.0, level, disagreement) for disagreement in (False, True) for level in LEVELS]
    violations = dict.fromkeys(promises, 0)
    usual = {False: 0, True: 0}
    spent = dict.fromkeys(promises, 0.0)
    for _ in range(arguments.trials):
        drawn = torch.randint(len(targets), (count,), generator=generator)
        policy = fit_full_policy(logits[:, drawn], targets[drawn])
        population, operations = with_ensemble(exits_alone, logits, policy.ensemble, evaluated.operations)
        held = population.subset(drawn)
        points = certified_points(held, policy, operations)
        for wanted in promises:
            point = certified(points, wanted)[-1]
            losses = count_losses(_thresholds(point, population), population)
            violations[wanted] += _percent_lost(losses, wanted) > wanted.percent
            spent[wanted] += point.operations / operations[-1] / arguments.trials
        for disagreement in usual:
            wanted = MaxLoss(1.0, CONFIDENCE_PERCENT, disagreement)
            losses = count_losses(usual_choice(held, wanted), population)
            usual[disagreement] += _percent_lost(losses, wanted) > wanted.percent
    rows = [
        {
            "promise": str(wanted),
            "broken %": _share_broken(number, arguments.trials),
            "operations %": f"{100 * spent[wanted]:.1f}",
            "usual choice: broken %": _share_broken(usual[wanted.disagreement], arguments.trials),
        }
        for wanted, number in violations.items()
    ]
    sys.stdout.write(
        f"{arguments.network}: {arguments.trials:,} trials of {count:,} held-out images, drawn from "
        f"{len(targets):,} test images\n{table(rows, list(rows[0]))}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
