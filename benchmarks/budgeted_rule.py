"""Time the budgeted rule: thresholds of 40 budgets, and their results on held-out and test images.

python -m benchmarks.budgeted_rule                                      # 50,000 images each, 1,000 classes
python -m benchmarks.budgeted_rule --images 500 --classes 10
"""

import argparse
import sys
import time

import torch

from adaptive_inference.budgeted import ExitPredictions, evaluate_thresholds, geometric_thresholds
from adaptive_inference.confidence import confidence_by_exit
from parsing import at_least

NUM_EXITS = 5


def main(argv: list[str] | None = None) -> None:
    """Print the seconds for the arguments (those of the process if None)."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.budgeted_rule", description="Time of the budgeted rule."
    )
    parser.add_argument(
        "--images", type=at_least(1), default=50_000, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--classes", type=at_least(1), default=1000, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--budgets", type=at_least(1), default=40, metavar="N", help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    targets = torch.randint(arguments.classes, (arguments.images,))
    sets, seconds_of_confidence = [], 0.0
    for _ in range(2):
        exits = []
        for _ in range(NUM_EXITS):  # one at a time, as the logits of all of them take a gigabyte
            logits = torch.randn(1, arguments.images, arguments.classes)
            began = time.perf_counter()
            exits.append(confidence_by_exit(logits))
            seconds_of_confidence += time.perf_counter() - began
        confidence, classes = (torch.cat(parts) for parts in zip(*exits, strict=True))
        sets.append(ExitPredictions(confidence, classes, targets))
    began = time.perf_counter()
    for thresholds in geometric_thresholds(sets[0].confidence, arguments.budgets):
        for predictions in sets:
            evaluate_thresholds(thresholds, predictions, range(1, NUM_EXITS + 1))
    seconds = time.perf_counter() - began
    size = f"2 x {arguments.images:,} images, {NUM_EXITS} exits, {arguments.classes:,} classes"
    sys.stdout.write(
        f"{arguments.budgets} budgets, {size}: {seconds:.2f} s for thresholds and results, "
        f"{seconds_of_confidence:.2f} s for confidences\n"
    )


if __name__ == "__main__":
    main()
