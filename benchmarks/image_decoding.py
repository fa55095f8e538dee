"""Ways from a JPEG file to an augmented training image of 224 pixels: images a second of one core.

    python -m benchmarks.image_decoding                      # photographs it makes up, 500 x 375
    python -m benchmarks.image_decoding --images DIR         # the JPEGs under DIR
    python -m benchmarks.image_decoding --size 4000 3000

Processor time is measured, not time on the clock, so that other programs on the machine count little. The ways take turns, and medians over
the rounds are compared. Libraries that the project does not require are measured where they are installed.
"""

import importlib
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from dataloader import CROP_AREAS, CROP_RATIOS, Delivery, FileBatches, Normalizer, decoded_fraction
from datasets import NORMALIZATION
from utils import CommandLineParser, UserError

SIZE = 224
MADE_UP_IMAGES = 16

Way = Callable[[Path], Tensor]


def main(argv: list[str] | None = None) -> int:
    """Print the figures; the exit status is 0 whatever they are, and 2 after a mistake."""
    parser = CommandLineParser(
        prog="benchmarks.image_decoding", description="Images a second of one core, from file to training image.", allow_abbrev=False
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder with JPEGs at any depth (default: made up)")
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("W", "H"), help="of made-up images (default: 500 375)")
    parser.add_argument("--limit", type=int, default=256, metavar="N", help="images at most (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="rounds, after one to warm up (default: %(default)s)")
    arguments = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if arguments.images is None:
                _make_up(Path(folder), arguments.size)
            files = _jpegs(arguments.images or Path(folder))
            compare(files[:: math.ceil(len(files) / arguments.limit)], arguments.repeat)
    except UserError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def compare(files: list[Path], rounds: int) -> None:
    """Print a line for every way."""
    pixels = statistics.mean(math.prod(Image.open(file).size) for file in files)
    kilobytes = statistics.mean(file.stat().st_size for file in files) / 1e3
    _print(f"{len(files)} JPEGs of {kilobytes:.0f} kB and {pixels / 1e6:.2f} megapixels on average, torch {torch.__version__}")
    _print(f"images a second of one core ({torch.backends.cpu.get_cpu_capability()}), and ratios to the plain way:")
    ways = {**ways_with_required_libraries(files), **ways_with_further_libraries()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a decoder is deprecated is known
        for _ in range(rounds + 1):
            for name, way in ways.items():
                began = time.process_time()
                for file in files:
                    way(file)
                seconds[name].append((time.process_time() - began) / len(files))
    rates = {name: 1 / statistics.median(measured[1:]) for name, measured in seconds.items()}
    plain = next(iter(rates.values()))
    for name, rate in rates.items():
        _print(f"  {name:<62}{rate:7,.0f}   {rate / plain:.2f}")


def ways_with_required_libraries(files: list[Path]) -> dict[str, Way]:
    """The plain way first, then the project's, then others."""
    mean_and_std = NORMALIZATION["imagenet"]
    plain = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*mean_and_std),
        ]
    )
    normalize = Normalizer(*mean_and_std, torch.device("cpu"))
    targets = torch.zeros(len(files), dtype=torch.int64)
    batches = FileBatches(files, targets, SIZE, Delivery(1, "standard", 1, normalize, torch.device("cpu")))
    index = {file: i for i, file in enumerate(files)}

    def ours(file: Path) -> Tensor:
        # What a worker does, the seed of each image included; whole batches become floats on the training device.
        return batches.augmented[index[file], index[file]][0]

    return {
        "PIL, transforms v1 to normalised floats (plain)": lambda file: plain(_decode(file)),
        "ours: PIL reduced to the crop, PyTorch resizes its bytes": ours,
        "ours, made floats on the same core": lambda file: normalize(ours(file)[None]),
        "PIL reduced to the crop (draft), PIL resizes the crop": lambda file: _crop(file, True, _resize_by_pil),
        "PIL, PyTorch resizes the crop's bytes": lambda file: _crop(file, False, _resize_by_torch),
        "PIL, PIL resizes the crop": lambda file: _crop(file, False, _resize_by_pil),
    }


def ways_with_further_libraries() -> dict[str, Way]:
    """Decoders that are not required, or will go, each with PyTorch's resizing of the crop's bytes."""
    ways = {}
    torchvision_io = _installed("torchvision.io", "decode_image")
    if torchvision_io:
        ways["torchvision.io.decode_image"] = lambda file: _augment(torchvision_io.decode_image(str(file), mode="RGB"))
    torchcodec = _installed("torchcodec.decoders", "decode_image")
    if torchcodec:
        ways["torchcodec.decoders.decode_image"] = lambda file: _augment(torchcodec.decode_image(str(file), mode="RGB"))
    simplejpeg = _installed("simplejpeg", "decode_jpeg")
    if simplejpeg:
        ways["simplejpeg.decode_jpeg"] = lambda file: _augment(_channels_first(simplejpeg.decode_jpeg(file.read_bytes(), "RGB")))
        ways["simplejpeg.decode_jpeg, reduced to the crop"] = lambda file: _augment_reduced(simplejpeg, file.read_bytes())
    cv2 = _installed("cv2", "IMREAD_COLOR_RGB")
    if cv2:
        cv2.setNumThreads(1)
        mode = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        ways["cv2.imread"] = lambda file: _augment(_channels_first(cv2.imread(str(file), mode)))
    return ways


def _decode(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _crop(file: Path, reduced: bool, resize: Callable[[Image.Image], Tensor]) -> Tensor:
    """A random resized crop, flipped or not; of the image at half, a quarter or an eighth of its size if the crop is still large enough."""
    with Image.open(file) as image:
        top, left, height, width = _window(image)
        if reduced:
            # The decoder takes the largest power of two that leaves the image at least this size, which is this one.
            reduction = decoded_fraction(height, width, SIZE)
            image.draft(None, tuple(side // reduction for side in image.size))
            top, left, height, width = (n // reduction for n in (top, left, height, width))
        crop = image.crop((left, top, left + width, top + height))
        crop = resize(crop if crop.mode == "RGB" else crop.convert("RGB"))
    return _flip(crop)


def _augment(pixels: Tensor) -> Tensor:
    top, left, height, width = _window(pixels)
    return _finish(pixels[:, top : top + height, left : left + width])


def _augment_reduced(simplejpeg: ModuleType, content: bytes) -> Tensor:
    full_height, full_width, *_ = simplejpeg.decode_jpeg_header(content)
    top, left, height, width = _window(torch.empty(0, full_height, full_width))
    reduction = decoded_fraction(height, width, SIZE)
    smallest = {"min_height": -(-full_height // reduction), "min_width": -(-full_width // reduction), "min_factor": 1}
    pixels = _channels_first(simplejpeg.decode_jpeg(content, "RGB", **(smallest if reduction > 1 else {})))
    top, left, height, width = (n // reduction for n in (top, left, height, width))
    return _finish(pixels[:, top : top + height, left : left + width])


def _window(image: Image.Image | Tensor) -> tuple[int, int, int, int]:
    return transforms.RandomResizedCrop.get_params(image, CROP_AREAS, CROP_RATIOS)


def _finish(crop: Tensor) -> Tensor:
    return _flip(v2.functional.resize(crop, [SIZE, SIZE], antialias=True))


def _flip(crop: Tensor) -> Tensor:
    return crop.flip(-1) if torch.rand(()) < 0.5 else crop


def _resize_by_pil(crop: Image.Image) -> Tensor:
    return v2.functional.pil_to_tensor(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def _resize_by_torch(crop: Image.Image) -> Tensor:
    return v2.functional.resize(_channels_first(np.array(crop)), [SIZE, SIZE], antialias=True)


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _installed(name: str, needed: str) -> ModuleType | None:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):  # the last two: a library it needs is missing
        return None
    return module if hasattr(module, needed) else None


def _jpegs(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise UserError(f"--images {folder} holds no JPEG")
    return files


def _make_up(folder: Path, size: tuple[int, int]) -> None:
    """Clouds of every scale: about as many bytes a pixel as photographs have."""
    rng = np.random.default_rng(0)
    width, height = size
    for i in range(MADE_UP_IMAGES):
        pixels = np.zeros((height, width, 3), np.float32)
        for cell in (2, 4, 8, 16, 32, 64, 128):
            shape = (math.ceil(height / cell) + 1, math.ceil(width / cell) + 1, 3)
            noise = Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8))
            pixels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) * cell**0.5
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
        Image.fromarray((255 * pixels).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
