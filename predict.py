"""Classify your own images with a trained network that stops as early as you allow.

    python predict.py photo.jpg folder/                                  # your newest run, half of its operations
    python predict.py folder/ --budget 2ms --format csv --output answers.csv
    python predict.py folder/ --max-loss 1% --confidence-level 95%
    python predict.py folder/ --deadline 5ms

Thresholds come from the file policy.json beside the network, which ``--evalmode dynamic`` writes. The exit status is 0, 1 if a file was
skipped (its name is on standard error), 2 after a mistake, 130 after Ctrl-C.
"""

import argparse
import atexit
import gc
import os
import sys
from pathlib import Path
from typing import NamedTuple

from adaptive_inference.measures import RULES
from models.files import BEST, find, policy_path
from utils import CommandLineParser, UserError, above, at_least, in_range, is_terminal

RUNS, SHIPPED = Path("save"), "imta_cifar100"


class Budget(NamedTuple):
    """A limit as it was typed: an amount and its unit, ``M`` (millions of operations), ``%`` (of the whole network) or ``ms``."""

    amount: float
    unit: str


def main(argv: list[str] | None = None) -> int:
    """Answer the images these arguments name (None: those of the process) and return the exit status."""
    arguments = parse(argv)
    atexit.register(gc.freeze)  # a last search for garbage in all of PyTorch would take seconds
    try:
        path = find_model(arguments.model)
        if is_terminal(sys.stderr):
            sys.stderr.write("predict.py: loading PyTorch\n")
        from engine.prediction import (
            answer_all,
        )  # here, as PyTorch takes seconds to load, and --help needs none

        return answer_all(arguments, path)
    except UserError as error:
        sys.stderr.write(f"predict.py: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("predict.py: interrupted before the first answer\n")
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> CommandLineParser:
    """Every flag."""
    parser = CommandLineParser(
        prog="predict.py",
        description="Classify images, each with as much of the network as it needs.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="image files, or folders of images")
    add(
        "--model",
        "--checkpoint",
        metavar="NAME|FILE",
        help="a network of weights/, or a file of ours or a released one (default: your newest run in save/, else imta_cifar100)",
    )
    add(
        "--policy",
        type=Path,
        metavar="FILE",
        help="thresholds for this network (default: policy.json beside it)",
    )
    add(
        "--budget",
        type=_budget,
        help="mean an image at most: 2ms, 40%% of the operations, or 12.5M operations (default: about 50%%)",
    )
    add("--accuracy", type=_percentage, metavar="PERCENT", help="on held-out images at least")
    add(
        "--max-loss",
        type=_percentage,
        metavar="PERCENT",
        help="of accuracy against the whole network, with --confidence-level",
    )
    add("--confidence-level", type=_level, metavar="PERCENT", help="of --max-loss (default: 95%%)")
    add(
        "--disagreement",
        action="store_true",
        help="--max-loss counts every answer that is not the whole network's",
    )
    add(
        "--deadline",
        type=_deadline,
        metavar="5ms",
        help="answer each image, or batch, by the last exit finished in that time",
    )
    add(
        "--rule",
        choices=list(RULES),
        help="only thresholds found by this rule (default: ensemble or optimised, if there are any)",
    )
    add(
        "--format",
        choices=["table", "csv", "json"],
        default="table",
        help="of the answers; json has the five best classes",
    )
    add("--output", type=Path, metavar="FILE", help="write the answers there (default: standard output)")
    add(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help="images at a time; all get their mean time (default: 64, with --deadline 1)",
    )
    add("--device", metavar="NAME", help="such as cpu or cuda:1 (default: the first GPU, or the CPU)")
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="names of the classes, one a line, of a released file, which holds none",
    )
    add(
        "--image-size",
        type=at_least(1),
        metavar="PIXELS",
        help="of a released file (default: 32 or 224, by its layers)",
    )
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The typed command line; mistakes end the program with one line and status 2."""
    flags = parser()
    arguments = flags.parse_args(argv)
    wishes = [
        name
        for name in ("budget", "accuracy", "max_loss", "deadline", "rule")
        if getattr(arguments, name) is not None
    ]
    for name, company in (("deadline", ()), ("max_loss", ("budget", "accuracy"))):
        others = [other for other in wishes if other != name and other not in company]
        if name in wishes and others:
            flags.error(
                f"--{name.replace('_', '-')} and --{others[0].replace('_', '-')} ask for different policies; give one of them"
            )
    if arguments.max_loss is None and (arguments.confidence_level is not None or arguments.disagreement):
        flags.error("--confidence-level and --disagreement belong to --max-loss")
    return arguments


def find_model(wanted: str | None) -> Path:
    """The file of the network to use; None: that of the newest run with policies, else the shipped one.

    Raises:
        UserError: there is none.
    """
    runs = [path for path in RUNS.rglob(BEST) if policy_path(path).exists()] if wanted is None else []
    try:
        return find(max(runs, key=lambda path: path.stat().st_mtime, default=wanted or SHIPPED))
    except OSError as error:
        raise UserError(str(error)) from None


def _budget(text: str) -> Budget:
    unit = next((unit for unit in ("ms", "%", "M") if text.endswith(unit)), "M")
    try:
        return Budget((in_range(0, 100) if unit == "%" else above(0))(text.removesuffix(unit)), unit)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{error}; milliseconds (2ms), a percentage (40%) or millions (12.5M)"
        ) from None


def _deadline(text: str) -> float:
    return above(0)(text.removesuffix("ms"))


def _level(text: str) -> float:
    return in_range(50, 100)(text.removesuffix("%"))


def _percentage(text: str) -> float:
    return in_range(0, 100)(text.removesuffix("%"))


if __name__ == "__main__":
    sys.exit(main())
