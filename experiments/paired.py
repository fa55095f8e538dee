"""Measure the difference between two networks on the same test images, and its sampling error.

python -m experiments.paired msdnet_cifar100 imta_cifar100 --data-root DIR    # the second minus the first

Both predict the same images, so the error of their difference is that of the images on which one of them
alone is right, and not that of two independent accuracies. It says nothing about other seeds of training.
"""

import os

# Before PyTorch loads; train_GE.py says why.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adaptive_inference.fold import fold
from engine.checkpoint import load_saved
from engine.collect import collect_logits
from engine.report import table
from engine.runtime.distributed import Processes
from experiments.network_data import load_own_data
from models.files import find
from parsing import CommandLineParser, user_path
from utils import UserError, print_error

ALONE = Processes(0, 1, torch.device("cpu"), ())


def main(argv: list[str] | None = None) -> int:
    """Print a row per exit for two networks of one data set; return the exit status."""
    parser = CommandLineParser(
        prog="experiments.paired", description="The difference between two networks, and its sampling error."
    )
    for name in ("first", "second"):
        parser.add_argument(name, metavar=name.upper(), help="a run, a file or a name in weights/")
    parser.add_argument("--data-root", type=user_path, metavar="DIR", help="(default: that of the run)")
    arguments = parser.parse_args(argv)
    try:
        first, second = (
            correct_by_exit(network, arguments.data_root) for network in (arguments.first, arguments.second)
        )
        if first.class_names != second.class_names or not torch.equal(first.targets, second.targets):
            raise UserError("the networks have different test images")
        if len(first.correct) != len(second.correct):
            raise UserError("the networks have different numbers of exits")
    except (UserError, OSError, ValueError) as error:
        print_error(f"{parser.prog}: {error}")
        return 2
    rows = []
    for k, pair in enumerate(zip(first.correct, second.correct, strict=True), start=1):
        difference, error = paired_difference(*pair)
        rows.append(
            {
                "exit": k,
                "first %": f"{100 * pair[0].double().mean():.2f}",
                "second %": f"{100 * pair[1].double().mean():.2f}",
                "difference": f"{difference:+.2f}",
                "standard error": f"{error:.2f}",
            }
        )
    sys.stdout.write(f"{len(first.targets):,} test images\n{table(rows, list(rows[0]))}\n")
    return 0


class Predicted(NamedTuple):
    """What a network predicts for its test images.

    Attributes:
        correct: Which images every exit predicts correctly, bool (K, N).
        targets: Their classes (N,).
        class_names: Names of the classes.
    """

    correct: Tensor
    targets: Tensor
    class_names: list[str]


def correct_by_exit(network: str, data_root: Path | None) -> Predicted:
    """Predict the test images of a network at every exit.

    Raises:
        UserError: The images cannot be read.
        OSError, ValueError: The network cannot be read.
    """
    loaded = load_saved(find(network))
    data = load_own_data(loaded, data_root, "anytime")
    logits, targets = collect_logits(fold(loaded.network), data.test, ALONE)
    return Predicted(logits.argmax(dim=2) == targets, targets, data.info.class_names)


def paired_difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the accuracy of the second minus that of the first, and its standard error, in points.

    Args:
        first: Which images are right by the first network, bool (N,).
        second: The same by the second network.
    """
    differences = second.double() - first.double()
    return 100 * differences.mean().item(), 100 * differences.std().item() / math.sqrt(len(differences))


if __name__ == "__main__":
    sys.exit(main())
