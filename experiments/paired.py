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

import torch
from torch import Tensor

from adaptive_inference.fold import fold
from engine.checkpoint import LoadedNetwork, load_saved
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
        first, second = (load_saved(find(network)) for network in (arguments.first, arguments.second))
        correct = correct_by_exit(first, second, arguments.data_root)
    except (UserError, OSError, ValueError) as error:
        print_error(f"{parser.prog}: {error}")
        return 2
    rows = []
    for k, pair in enumerate(zip(*correct, strict=True), start=1):
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
    sys.stdout.write(f"{correct[0].shape[1]:,} test images\n{table(rows, list(rows[0]))}\n")
    return 0


def correct_by_exit(
    first: LoadedNetwork, second: LoadedNetwork, data_root: Path | None
) -> tuple[Tensor, Tensor]:
    """Return which of the same test images both networks predict correctly at every exit, bool (K, N) each.

    Raises:
        UserError: The networks cannot be compared, or the images cannot be read.
    """
    same_data = first.data == second.data and torch.equal(first.split.test_digests, second.split.test_digests)
    if not same_data or first.network.num_exits != second.network.num_exits:
        raise UserError("the networks differ in their data set, its preparation, or their number of exits")
    test = load_own_data(first, data_root, "anytime").test
    logits, targets = collect_logits(fold(first.network), test, ALONE)
    other_logits, _ = collect_logits(fold(second.network), test, ALONE)
    return logits.argmax(dim=2) == targets, other_logits.argmax(dim=2) == targets


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
