"""Ways from a JPEG file to an augmented training image of 224 pixels: images a second of one core.

    python -m benchmarks.image_decoding --images DIR         # the JPEGs under DIR

Processor time is measured, not time on the clock, so that other programs on the machine count little. The ways take turns, and medians over
the rounds are compared.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import io, transforms
from torchvision.transforms import v2

from dataloader import CROP_AREAS, CROP_RATIOS, Delivery, FileBatches, Normalizer
from datasets import NORMALIZATION
from utils import CommandLineParser

SIZE = 224


def main(argv: list[str] | None = None) -> None:
    """Print a line for every way."""
    parser = CommandLineParser(
        prog="benchmarks.image_decoding", description="Images a second of one core, from file to training image.", allow_abbrev=False
    )
    parser.add_argument("--images", type=Path, metavar="DIR", required=True, help="folder with JPEGs at any depth")
    parser.add_argument("--limit", type=int, default=256, metavar="N", help="images at most (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="rounds, after one to warm up (default: %(default)s)")
    arguments = parser.parse_args(argv)
    files = sorted(file for file in arguments.images.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        parser.error(f"--images {arguments.images} holds no JPEG")
    files = files[:: math.ceil(len(files) / arguments.limit)]
    torch.set_num_threads(1)
    megapixels = statistics.mean(math.prod(Image.open(file).size) for file in files) / 1e6
    print(f"{len(files)} JPEGs of {megapixels:.2f} megapixels on average, torch {torch.__version__}")
    print(f"images a second of one core ({torch.backends.cpu.get_cpu_capability()}), and ratios to the plain way:")
    ways = ways_of_decoding(files)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a decoder is deprecated is known
        for _ in range(arguments.repeat + 1):
            for name, way in ways.items():
                began = time.process_time()
                for file in files:
                    way(file)
                seconds[name].append((time.process_time() - began) / len(files))
    rates = {name: 1 / statistics.median(measured[1:]) for name, measured in seconds.items()}
    plain = next(iter(rates.values()))
    for name, rate in rates.items():
        print(f"  {name:<62}{rate:7,.0f}   {rate / plain:.2f}")


def ways_of_decoding(files: list[Path]) -> dict[str, Callable[[Path], Tensor]]:
    """The plain way first, then the project's, then that with torchvision's own decoder."""
    augment = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    plain = transforms.Compose([*augment, transforms.ToTensor(), transforms.Normalize(*NORMALIZATION["imagenet"])])
    normalize = Normalizer(*NORMALIZATION["imagenet"], torch.device("cpu"))
    delivery = Delivery(1, "standard", 1, normalize, torch.device("cpu"))
    batches = FileBatches(files, torch.zeros(len(files), dtype=torch.int64), SIZE, delivery)
    index = {file: i for i, file in enumerate(files)}
    crop_and_flip = v2.Compose([v2.RandomResizedCrop(SIZE, CROP_AREAS, CROP_RATIOS, antialias=True), v2.RandomHorizontalFlip()])

    def ours(file: Path) -> Tensor:
        # What a worker does, the seed of each image included; whole batches become floats on the training device.
        return batches.augmented[index[file], index[file]][0]

    return {
        "PIL, transforms v1 to normalised floats (plain)": lambda file: plain(Image.open(file).convert("RGB")),
        "ours: PIL reduced to the crop, PyTorch resizes its bytes": ours,
        "ours, made floats on the same core": lambda file: normalize(ours(file)[None]),
        "torchvision.io.decode_image, the crop resized by PyTorch": lambda file: crop_and_flip(io.decode_image(str(file), mode="RGB")),
    }


if __name__ == "__main__":
    main()
