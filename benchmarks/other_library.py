"""Compare early exit here and in ``earlyon`` 0.3.0, with the same network, weights, exits and thresholds.

    pip install earlyon==0.3.0
    python -m benchmarks.other_library

Thresholds let half of the images leave at exit 1, and no other image before the last exit. Weights are
random: the shares are as wanted, but the predictions mean nothing. ``earlyon`` lets a batch leave only as a
whole.
"""

import functools
import sys

import torch
from torch import Tensor, nn

from adaptive_inference import AdaptivePredictor, fold
from adaptive_inference.policies import Policy
from benchmarks.timing import median_seconds
from models import Backbone, build_backbone
from parsing import CommandLineParser, at_least

EXITS = ("layer1", "layer2", "layer3")
NUM_CLASSES = 100
NEVER = 1.0  # a random network is never this sure


class _Head(nn.Module):
    """One of our exits, logits included, as ``earlyon`` calls it."""

    def __init__(self, exit: nn.Module):
        super().__init__()
        self.exit = exit

    def forward(self, x: Tensor) -> Tensor:
        return self.exit.linear(self.exit.features(x))


def in_other_library(network: Backbone, thresholds: list[float]) -> nn.Module:
    """Return the network inside ``earlyon``'s wrapper; modules are shared.

    Raises:
        ImportError: The package is missing.
    """
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

    points = [
        ExitPoint(f"e{k}", path, exit.channels)
        for k, (path, exit) in enumerate(zip(network.config["exits"], network.exits, strict=True))
    ]
    config = EarlyExitConfig(
        backbone=network.config["name"],
        num_classes=network.num_classes,
        exit_points=points,
        confidence_thresholds=thresholds,
        loss_weights=[1 / (len(points) + 1)] * (len(points) + 1),
    )
    heads = {point.name: _Head(exit) for point, exit in zip(points, network.exits, strict=True)}
    return EarlyExitWrapper(network.network, heads, lambda logits: logits, config).eval()


def _one_by_one(function: object, images: Tensor) -> None:
    for i in range(len(images)):
        function(images[i : i + 1])


def main(argv: list[str] | None = None) -> int:
    """Print times per image and their ratios; the exit status is 2 after a mistake."""
    parser = CommandLineParser(
        prog="benchmarks.other_library", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--images", type=at_least(1), default=64, metavar="N", help="images, also the large batch"
    )
    parser.add_argument("--image-size", type=at_least(1), default=224, metavar="PIXELS")
    parser.add_argument("--threads", type=at_least(1, 1024), default=2, metavar="N")
    parser.add_argument("--rounds", type=at_least(1), default=7, metavar="N")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    size = arguments.image_size
    try:
        network = build_backbone("resnet18", list(EXITS), NUM_CLASSES, image_size=size).eval()
    except ValueError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    # Different contrasts spread the confidences of a random network.
    images = (
        torch.randn(arguments.images, 3, size, size)
        * torch.linspace(0.2, 3, arguments.images)[:, None, None, None]
    )
    with torch.no_grad():
        confidence = network(images, 1)[0].softmax(dim=1).amax(dim=1).sort().values
    middle = confidence[arguments.images // 2 - 1 : arguments.images // 2 + 1].mean().item()
    thresholds = [middle, NEVER, NEVER]
    try:
        theirs = in_other_library(network, thresholds)
    except ImportError as error:
        sys.stderr.write(f"{parser.prog}: {error}; pip install earlyon==0.3.0 (0.3.0 is compared here)\n")
        return 2
    predictor = AdaptivePredictor(fold(network), Policy((*thresholds, 0.0)))
    with torch.inference_mode():
        left = predictor(images).exits
        leaving = f"{(left == 0).sum()} of {len(images)} images leave at exit 1"
        print(f"resnet18, {size} pixels, {arguments.threads} threads; {leaving}")
        for batch_size in (1, arguments.images):
            ours_plain = functools.partial(network.early_exit, thresholds=[*thresholds, 0.0])
            single = batch_size == 1
            runs = {
                "earlyon": theirs if single else theirs.forward_inference_batched,
                "ours, network.early_exit": ours_plain,
                "ours, folded (load_predictor)": predictor,
            }
            functions = {
                name: functools.partial(_one_by_one, run, images)
                if single
                else functools.partial(run, images)
                for name, run in runs.items()
            }
            seconds = median_seconds(functions, arguments.rounds)
            print(f"  batch {batch_size}:")
            for name, value in seconds.items():
                per_image = 1e3 * value / len(images)
                speed = f"{seconds['earlyon'] / value:.2f} times as fast as earlyon"
                print(f"    {name}: {per_image:.2f} ms per image, {speed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
