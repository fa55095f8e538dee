"""A pretrained network on CIFAR-100: exits alone, joint training, and what the paper adds.

    python examples/efficientnet_lite.py --output tf_efficientnet_lite0.safetensors      # once, see there
    python -m experiments.backbones --data-root data/cifar100 --weights tf_efficientnet_lite0.safetensors
    python -m experiments.backbones --table        # of what is complete

``--data-root`` is that of ``train_GE.py --data cifar100``; images are enlarged to 64 pixels.
Run it again and it resumes. When a run is complete, its small files are copied into
``results/backbones/seed_N/ARM/``.
"""

import statistics
import sys
from pathlib import Path

from engine.report import best_within, read_csv
from experiments.arms import (
    RESULTS,
    Arm,
    add_data_root,
    class_folders,
    command_line,
    seeds_of,
    train_arms,
    with_origins,
)
from experiments.markdown import markdown_table, spread
from parsing import CommandLineParser, user_path
from utils import UserError, print_error

FOLDER = RESULTS / "backbones"
ARCH, NUM_EXITS = "timm/tf_efficientnet_lite0", 4
STAGE_1 = [
    *("--data", "cifar100", "--arch", ARCH, "--exits", str(NUM_EXITS)),
    *("--image-size", "64", "--val-size", "5000"),
    *("--epochs", "6", "--warmup-epochs", "0.5", "--batch-size", "64", "--lr", "0.05", "--lr-type", "cosine"),
    *("--nesterov", "--weight-decay", "1e-4", "--pretrained-lr-factor", "0.4", "--compile", "off"),
    *("--save-every-minutes", "10"),
]
STAGE_2 = [
    *("--epochs", "3", "--warmup-epochs", "0", "--batch-size", "64", "--lr", "0.05", "--lr-type", "cosine"),
    *("--nesterov", "--weight-decay", "1e-4", "--compile", "off", "--save-every-minutes", "10"),
]
# In the order of the table and of training.
ARMS = {
    "exits": Arm("exits alone, on the frozen network", None, ["--freeze", "backbone"]),
    "joint": Arm("all layers, without GE", None, ["--no-gradient-equilibrium"]),
    "GE": Arm("GE", None, []),
    "GE_ISC_OFA": Arm("GE + ISC + OFA", "GE", []),
    "GE_boosted": Arm("GE, boosted exits", None, ["--boosted-exits"]),
}


def command(arm: str, seed: int, data_root: Path, weights: Path, work: Path) -> list[str]:
    """Return the command line of one run."""
    stage_1 = ["--data-root", str(data_root), "--pretrained", str(weights), *STAGE_1]
    return command_line(ARMS[arm], work / f"seed_{seed}" / arm, seed, stage_1, STAGE_2)


def train_all(
    arms: list[str], seeds: list[int], data_root: Path, weights: Path, work: Path, more: list[str]
) -> int:
    """Run what is not complete, with ``more`` flags for all, and return the exit status of the last run."""
    images = class_folders(data_root, work / "cifar100")

    def command_of(arm: str, seed: int) -> list[str]:
        return [*command(arm, seed, images, weights, work), *more]

    results = None if more else FOLDER  # with more flags the runs are trials
    return train_arms(with_origins(arms, ARMS), seeds, command_of, work, results)


def results_table(folder: Path = FOLDER) -> str:
    """Return a table in Markdown, a row per arm: top-1 of every exit, and within half of the operations.

    Args:
        folder: Holds the results, ``seed_N/ARM/``.
    """
    rows = []
    for name, arm in ARMS.items():
        of_stage_1 = arm.origin or name
        by_seed = (_accuracies(run, run.parent / of_stage_1) for run in seeds_of(name, folder))
        columns = list(zip(*by_seed, strict=True))
        if columns:
            rows.append([arm.title, *map(spread, columns), str(len(columns[0]))])
    names = [f"exit {k}" for k in range(1, NUM_EXITS + 1)]
    return markdown_table(["training", *names, "mean of exits", "budget (half)", "n"], rows)


def _accuracies(run: Path, stage_1: Path) -> list[float]:
    """Return the test accuracy of every exit, their mean, and that of the best policy within half.

    Half is that of the run of stage 1, also for stage 2, which adds operations.
    """
    by_exit = [row["acc1"] for row in read_csv(run / "anytime.csv")]
    operations = read_csv(stage_1 / "anytime.csv")[-1]["operations"]
    best = best_within(read_csv(run / "budgeted.csv"), 0.5 * operations)
    if best is None:
        raise UserError(f"{run} has no policy within half of the operations")
    return [*by_exit, statistics.mean(by_exit), best["test_acc1"]]


def main(argv: list[str] | None = None) -> int:
    """Train, or print the table."""
    parser = CommandLineParser(
        prog="experiments.backbones",
        description=__doc__.splitlines()[0],
        epilog="Further flags go to the training of every arm.",
        allow_abbrev=False,
    )
    add_data_root(parser, required=False)
    parser.add_argument(
        "--weights",
        type=user_path,
        metavar="FILE",
        help=f"weights of {ARCH}, written by examples/efficientnet_lite.py",
    )
    parser.add_argument(
        "--work", type=user_path, default=Path("save/backbones"), metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N", help="(default: 1)")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help="(default: all)"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the kept results")
    arguments, more = parser.parse_known_args(argv)
    if not arguments.table and (arguments.data_root is None or arguments.weights is None):
        parser.error("--data-root and --weights are needed")
    try:
        if arguments.table:
            sys.stdout.write(f"{results_table()}\n")
            return 0
        return train_all(
            arguments.arms, arguments.seeds, arguments.data_root, arguments.weights, arguments.work, more
        )
    except UserError as error:
        print_error(f"{parser.prog}: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
