"""Time and memory of budgeted evaluation at ImageNet's size, after the logits are there.

python -m benchmarks.budgeted_evaluation             # 50,000 + 50,000 images, 5 exits, 1,000 classes
"""

import argparse
import resource
import time

import torch

from adaptive_inference import ExitAnswers, confidence_by_exit, curve_rows, geometric_thresholds
from utils import CommandLineParser


def main() -> None:
    parser = CommandLineParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="held-out images, and test images")
    parser.add_argument("--exits", type=int, default=5)
    parser.add_argument("--classes", type=int, default=1000)
    options = parser.parse_args()
    shape = (options.exits, options.images, options.classes)
    val, test = (torch.empty(shape).normal_(std=3) for _ in range(2))
    targets = torch.randint(options.classes, (options.images,))
    operations = list(range(1, options.exits + 1))
    gigabytes_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    began = time.perf_counter()
    val, test = (ExitAnswers(*confidence_by_exit(logits), targets) for logits in (val, test))
    scored = time.perf_counter()
    rows = curve_rows(geometric_thresholds(val.confidence), val, test, operations)
    done = time.perf_counter()
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - gigabytes_before
    one_exit = options.images * options.classes * 4 / 2**30
    print(f"{len(rows)} budgets, {options.images:,} + {options.images:,} images, {options.exits} exits, {options.classes:,} classes")
    print(f"softmax and confidence {scored - began:.2f} s, budgets {done - scored:.2f} s, together {done - began:.2f} s")
    print(f"memory beside the logits: {gigabytes:.2f} GiB, {gigabytes / one_exit:.1f} times one exit's probabilities")


if __name__ == "__main__":
    main()
