"""Classify your own images with a trained network that stops as early as you allow.

    python predict.py photo.jpg folder/             # your newest run, half of its operations
    python predict.py folder/ --budget 2ms --format csv --output predictions.csv
    python predict.py folder/ --max-loss 1% --confidence-level 95%
    python predict.py folder/ --deadline 5ms

Thresholds come from the file ``policy.json`` beside the network (or ``NAME.policy.json``), which
``--evalmode dynamic`` writes. The exit status is 0, 1 if a file was skipped (its name is on standard error),
2 after a mistake, 3 if ``--drift-alarm`` fired and no file was skipped, and 129, 130 or 143 after the end of
the terminal, Ctrl-C or SIGTERM.
What was predicted before a signal, or before memory ran out, is kept.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

# Before PyTorch loads; train_GE.py says why.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Spinning for some microseconds (1,000 rounds in GNU's library) does no harm, and is faster than sleeping.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from adaptive_inference.policies import RULES
from adaptive_inference.policy_files import policy_path
from engine.prediction.predict_all import predict_all
from engine.runtime.signals import Interrupted, handle_signals
from models.files import BEST, find
from parsing import CommandLineParser, above, at_least, in_range, output_file, user_path
from utils import UserError, print_error

RUNS, SHIPPED = Path("save"), "imta_cifar100"


class Budget(NamedTuple):
    """A limit as typed: amount and unit.

    The unit is ``M`` (millions of operations), ``%`` (of the full network) or ``ms``.
    """

    amount: float
    unit: str


def main(argv: list[str] | None = None) -> int:
    """Predict the images these arguments name (those of the process if None) and return the exit status."""
    arguments = parse(argv)
    try:
        with handle_signals() as requests:
            return predict_all(arguments, find_model(arguments.model), requests)
    except UserError as error:
        print_error(f"predict.py: {error}")
        return 2
    except Interrupted as stop:
        print_error("predict.py: stopped by a signal")
        return stop.exit_status
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> CommandLineParser:
    """Return the parser with every flag."""
    parser = CommandLineParser(
        prog="predict.py",
        description="Classify images, each with as much of the network as it needs.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths", nargs="+", type=user_path, metavar="PATH", help="image files, or folders of images"
    )
    parser.add_argument(
        "--model",
        "--checkpoint",
        metavar="NAME|FILE|DIR",
        help="a file, the directory of a run, or a name in weights/ "
        "(default: your newest run in save/, else imta_cifar100)",
    )
    _add_policy_flags(parser.add_argument_group("how much of the network"))
    _add_output_flags(parser.add_argument_group("output and speed"))
    return parser


def _add_policy_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--budget",
        type=_budget,
        help="mean per image at most: 2ms, 60%% of the operations, or 12.5M operations (default: about 50%%)",
    )
    group.add_argument(
        "--accuracy", type=_percentage, metavar="PERCENT", help="at least this accuracy on held-out images"
    )
    group.add_argument(
        "--max-loss",
        type=_percentage,
        metavar="PERCENT",
        help="largest accepted loss of accuracy against the full network, promised with --confidence-level",
    )
    group.add_argument(
        "--confidence-level",
        type=_level,
        metavar="PERCENT",
        help="confidence of the promise of --max-loss (default: 95%%)",
    )
    group.add_argument(
        "--disagreement",
        action="store_true",
        help="--max-loss counts every prediction that differs from the full network's",
    )
    group.add_argument(
        "--deadline",
        type=_deadline,
        metavar="5ms",
        help="predict each image, or batch, by the last exit that ends in this time",
    )
    group.add_argument(
        "--rule",
        choices=list(RULES),
        help="only policies of this rule (default: ensemble, else optimised, else any)",
    )
    group.add_argument(
        "--drift-alarm",
        action="store_true",
        help="report once when images no longer resemble the held-out ones (exit status 3)",
    )
    group.add_argument(
        "--policy",
        type=user_path,
        metavar="FILE",
        help="policies of this network (default: policy.json or NAME.policy.json beside it)",
    )


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--format",
        choices=["table", "csv", "json"],
        default="table",
        help="output format; json has the five best classes (default: table)",
    )
    group.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help="write the predictions there (default: standard output)",
    )
    group.add_argument(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help="images at a time; all get their mean time (default: 64; 1 with --deadline)",
    )
    group.add_argument(
        "--device", metavar="NAME", help="such as cpu or cuda:1 (default: the first GPU, or the CPU)"
    )
    group.add_argument(
        "--threads",
        type=at_least(1, 1024),
        metavar="N",
        help="CPU threads, for reading and for the network (default: one per core, at most 4 for reading, "
        "and for the network as many as a batch occupies)",
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; a mistake ends the program with one line and status 2."""
    flags = build_parser()
    arguments = flags.parse_args(argv)
    names = ("budget", "accuracy", "max_loss", "deadline", "rule")
    given = [name for name in names if getattr(arguments, name) is not None]
    for name, allowed in (("deadline", ()), ("max_loss", ("budget", "accuracy"))):
        others = [other for other in given if other != name and other not in allowed]
        if name in given and others:
            flag, other = (f"--{text.replace('_', '-')}" for text in (name, others[0]))
            flags.error(f"{flag} and {other} ask for different policies; give one of them")
    if arguments.max_loss is None and (arguments.confidence_level is not None or arguments.disagreement):
        flags.error("--confidence-level and --disagreement belong to --max-loss")
    by_time = arguments.deadline is not None or (
        arguments.budget is not None and arguments.budget.unit == "ms"
    )
    if arguments.drift_alarm and by_time:
        flags.error("--drift-alarm needs one policy; --deadline and a budget in ms change it with the load")
    return arguments


def find_model(wanted: str | None) -> Path:
    """Return the file of the network to use; for None the newest run's with policies, else the shipped one.

    Raises:
        UserError: There is none.
    """
    try:
        if wanted is not None:
            return find(wanted)
        runs = [path for path in RUNS.rglob(BEST) if policy_path(path).exists()]
        return find(max(runs, key=lambda path: path.stat().st_mtime, default=SHIPPED))
    except OSError as error:
        raise UserError(str(error)) from None


def _budget(text: str) -> Budget:
    unit = next((unit for unit in ("ms", "%", "M") if text.endswith(unit)), None)
    try:
        if unit is None:
            raise argparse.ArgumentTypeError(f"{text!r} has no unit")
        return Budget((in_range(0, 100) if unit == "%" else above(0))(text.removesuffix(unit)), unit)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{error}; milliseconds (2ms), a percentage (60%) or millions of operations (12.5M)"
        ) from None


def _deadline(text: str) -> float:
    return above(0)(text.removesuffix("ms"))


def _level(text: str) -> float:
    return in_range(50, 100)(text.removesuffix("%"))


def _percentage(text: str) -> float:
    return in_range(0, 100)(text.removesuffix("%"))


if __name__ == "__main__":
    sys.exit(main())
