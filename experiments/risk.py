"""How often a promise about accuracy fails, and what it saves, on real images.

    python -m experiments.risk save/cifar100/IMTA --max-loss 1 --splits 200

The test images of a run are split into two halves again and again: one half sets and tests policies as the
    held-out images of a run do
(``adaptive_inference.promises.risk``), the other stands for new images, on which the promise is kept or not.
Beside it the usual choice: the cheapest policy that lost no more on the first half. As all are the same
images, a half on which a policy looks better than it is leaves another on which it looks worse: failures are
counted too often rather than too seldom.
"""

import math
import sys
from pathlib import Path

import torch

from adaptive_inference.budgeted import NONE_LEAVE, ExitPredictions, assign_exits, geometric_thresholds
from adaptive_inference.fold import fold
from adaptive_inference.policies import LossCounts, Policy
from adaptive_inference.promises.risk import MaxLoss, certified, certified_points, count_losses
from args import parse
from dataloader import load_data
from engine.checkpoint import load_saved
from engine.collect import collect_logits
from engine.distributed import Processes
from engine.report import table
from models import count_operations
from utils import CommandLineParser, UserError

ALONE = Processes(0, 1, torch.device("cpu"), ())


def certified_thresholds(held: ExitPredictions, operations: list[int], wanted: MaxLoss) -> list[float]:
    """Return those of the cheapest policy that keeps the promise."""
    points = certified_points(held, Policy((NONE_LEAVE,) * len(operations)), operations)
    return certified(points, wanted)[-1].policy.thresholds


def usual_thresholds(held: ExitPredictions, operations: list[int], wanted: MaxLoss) -> list[float]:
    """Return those of the cheapest policy of the geometric rule that lost no more on the same images."""
    for thresholds in geometric_thresholds(held.confidence):
        if _percent_lost(count_losses(thresholds, held), wanted) <= wanted.percent:
            return thresholds.tolist()
    return [NONE_LEAVE] * len(operations)


def _percent_lost(losses: LossCounts, wanted: MaxLoss) -> float:
    return 100 * (losses.other if wanted.disagreement else losses.worse - losses.better) / losses.images


def main(argv: list[str] | None = None) -> None:
    """Print failures and savings for the run that the arguments name (None: those of the process)."""
    parser = CommandLineParser(
        prog="experiments.risk",
        description="How often promises about accuracy fail, over splits of the test images.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="with a finished run")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="(default: that of the run)")
    parser.add_argument(
        "--max-loss", type=float, default=1.0, metavar="PERCENT", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--confidence-level", type=float, default=95.0, metavar="PERCENT", help="(default: %(default)s)"
    )
    parser.add_argument("--disagreement", action="store_true", help="count every other answer as lost")
    parser.add_argument("--splits", type=int, default=200, metavar="N", help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    wanted = MaxLoss(arguments.max_loss, arguments.confidence_level, arguments.disagreement)
    try:
        saved = load_saved(arguments.run, {})
        flags = ["--data-root", str(arguments.data_root)] if arguments.data_root else []
        settings = parse("GE", ["--evalmode", *flags]).settings(stored=saved.settings)
        data = load_data(settings, ALONE.device, None, saved.data, saved.split)
        logits, targets = collect_logits(fold(saved.network), data.test, ALONE)
    except UserError as error:
        parser.error(str(error))
    predictions = ExitPredictions.from_logits(logits, targets)
    operations = count_operations(saved.network, data.info.image_size)
    counts = torch.tensor(operations, dtype=torch.float64) / operations[-1]
    generator = torch.Generator().manual_seed(0)
    splits = [torch.randperm(len(targets), generator=generator).chunk(2) for _ in range(arguments.splits)]
    rows = []
    for way, choose in {"certified": certified_thresholds, "usual choice": usual_thresholds}.items():
        lost, spent = [], []
        for halves in splits:
            held, new = map(predictions.subset, halves)
            thresholds = torch.tensor(choose(held, operations, wanted))
            lost.append(_percent_lost(count_losses(thresholds, new), wanted))
            spent.append(counts[assign_exits(new.confidence, thresholds)].mean().item())
        share = sum(x > wanted.percent for x in lost) / len(splits)
        error = math.sqrt(share * (1 - share) / len(splits))
        means = [sum(values) / len(splits) for values in (lost, spent)]
        kept = {"": way, "promise failed in %": f"{100 * share:.1f} +- {100 * error:.1f}"}
        rows.append({**kept, "mean loss %": means[0], "operations %": 100 * means[1]})
    sys.stdout.write(f"{len(targets):,} test images, {arguments.splits} splits in halves: {wanted}\n")
    sys.stdout.write(table(rows, list(rows[0])) + "\n")


if __name__ == "__main__":
    main()
