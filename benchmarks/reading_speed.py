"""Measure how fast threads decode, crop and resize images for training, beside DataLoader processes.

    python -m benchmarks.reading_speed                       # JPEGs of 800 x 600 to crops of 224
    python -m benchmarks.reading_speed --images 128 --rounds 1   # quickly

Both sides read the same files with the same transform; they take turns, and medians over rounds are printed.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from image_data.reading import read_image
from image_data.threads import map_batches
from image_data.transforms import TrainingTransform
from parsing import CommandLineParser, at_least
from utils import available_cores

WIDTH, HEIGHT, CROP, BATCH_SIZE = 800, 600, 224, 32

_print = functools.partial(print, flush=True)


class _Files(Dataset):
    def __init__(self, files: list[Path], transform: Callable[[Image.Image], torch.Tensor]):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return read_image(self.files[index], self.transform)


def main(argv: list[str] | None = None) -> int:
    """Print the rates; the exit status is 0 whatever they are."""
    parser = CommandLineParser(
        prog="benchmarks.reading_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores = available_cores()
    parser.add_argument("--images", type=at_least(BATCH_SIZE), default=512, metavar="N", help="per round")
    parser.add_argument("--rounds", type=at_least(1), default=5, metavar="N", help="of every side")
    parser.add_argument(
        "--workers", type=at_least(1), default=cores, metavar="N", help="threads or processes"
    )
    arguments = parser.parse_args(argv)
    if arguments.images <= arguments.workers * BATCH_SIZE:
        parser.error(f"--images: {arguments.workers} workers need more than {arguments.workers * BATCH_SIZE}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        dataset = _Files(write_files(files, arguments.images), TrainingTransform(CROP))
        workers = arguments.workers
        sides = {
            "1 thread": functools.partial(by_threads, dataset, 1),
            f"{workers} threads": functools.partial(by_threads, dataset, workers),
            f"{workers} processes": functools.partial(by_processes, dataset, workers),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, batches in sides.items():
                rates[name].append(images_per_second(batches(), workers))
    for name, values in rates.items():
        _print(f"{name}: {statistics.median(values):,.0f} images/s")
    return 0


def write_files(folder: Path, count: int) -> list[Path]:
    """Write smooth random JPEGs and return their names."""
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        pixels = rng.integers(256, size=(HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
        files.append(folder / f"{i}.jpg")
        Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(files[-1], quality=90)
    return files


def by_threads(dataset: _Files, threads: int) -> Iterator[int]:
    """Yield the size of every batch that threads read."""
    batches = torch.arange(len(dataset)).split(BATCH_SIZE)
    for images in map_batches(dataset.__getitem__, (batch.tolist() for batch in batches), threads):
        yield len(torch.stack(images))


def by_processes(dataset: _Files, processes: int) -> Iterator[int]:
    """Yield the size of every batch that processes read; they start before the first one is asked for."""
    loader = iter(DataLoader(dataset, BATCH_SIZE, num_workers=processes))
    for images in loader:
        yield len(images)


def images_per_second(batches: Iterator[int], workers: int) -> float:
    """Count images after the first batch of every worker, until which threads and processes start."""
    for _ in range(workers):
        next(batches)
    began = time.perf_counter()
    return sum(batches) / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
