"""Measure the seconds from the start of a training to its first step, with few and with many image files.

    python -m benchmarks.start_up                   # 200 and 20,000 JPEGs, a minute or two
    python -m benchmarks.start_up --files 100 200    # quickly

Every round starts ``train_GE.py`` once with each number of files and stops it after its first step. A fifth
of the files are test images. The JPEGs of 256 pixels are few different ones under many names.
"""

import argparse
import functools
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from parsing import CommandLineParser, at_least
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
CLASSES, DIFFERENT = 20, 16
NETWORK = "--nBlocks 2 --nChannels 8 --growthRate 4 --batch-size 32 --epochs 1 --compile off --amp off"

_print = functools.partial(print, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Print the seconds; the exit status is 0 whatever they are, and 2 after a mistake."""
    parser = CommandLineParser(
        prog="benchmarks.start_up", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number = {"type": at_least(100), "metavar": "N"}
    parser.add_argument("--files", nargs="+", default=[200, 20_000], help="numbers of files", **number)
    parser.add_argument("--rounds", type=at_least(1), default=3, metavar="N", help="starts with each number")
    parser.add_argument(
        "--image-size", type=at_least(65), default=224, metavar="PIXELS", help="of the network"
    )
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        roots = {count: write_folder(Path(folder) / str(count), count) for count in arguments.files}
        seconds: dict[int, list[float]] = {count: [] for count in roots}
        try:
            for _ in range(arguments.rounds):
                for count, root in roots.items():
                    seconds[count].append(seconds_to_first_step(root, arguments.image_size))
        except UserError as error:
            sys.stderr.write(f"benchmarks.start_up: {error}\n")
            return 2
    medians = {count: statistics.median(values) for count, values in seconds.items()}
    for count, median in medians.items():
        _print(f"{count:,} files: first step after {median:.1f} s")
    low, high = min(medians), max(medians)
    if low != high:
        _print(f"{high:,} files instead of {low:,}: {medians[high] - medians[low]:.1f} s more")
    return 0


def write_folder(root: Path, count: int) -> Path:
    """Write ``count`` JPEGs into folders of classes, a fifth of them as test images, and return ``root``."""
    rng, contents = np.random.default_rng(0), []
    for _ in range(DIFFERENT):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).resize((256, 256)).save(
            stream, "JPEG"
        )
        contents.append(stream.getvalue())
    for i in range(count):
        folder = root / ("test" if i // CLASSES % 5 == 0 else "train") / f"class {i % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(contents[i % DIFFERENT])
    return root


def seconds_to_first_step(root: Path, image_size: int) -> float:
    """Start a training, stop it after its first step, and return the seconds that passed until then.

    Raises:
        UserError: The training ended before its first step.
    """
    with tempfile.TemporaryDirectory() as save, tempfile.TemporaryFile("w+") as errors:
        flags = ["--data-root", str(root), "--save", str(Path(save) / "GE"), "--image-size", str(image_size)]
        command = [sys.executable, "train_GE.py", *flags, *NETWORK.split(), "--print-freq", "1"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        began = time.monotonic()
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as program:
            found = any(line.startswith("epoch 1/") for line in program.stdout)
            seconds = time.monotonic() - began
            program.terminate()
            program.communicate()
        if not found:
            errors.seek(0)
            raise UserError(f"the training ended before its first step: {errors.read()}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
