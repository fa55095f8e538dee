"""Read image files as RGB.

The EXIF orientation is applied, transparency is put on white, gray of more than 8 bits is scaled to bytes,
and decompression bombs are refused.

Example:
    image = read_image("photo.jpg")                                # a PIL image
    pixels = read_image("photo.jpg", evaluation_transform(224, 0.875))    # bytes (3, 224, 224)
"""

import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from image_data.transforms import MAX_PIXELS, rgb
from models.errors import first_line
from utils import UserError

# The content decides, whatever the suffix says. For other formats PIL may start programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MAX_SIDES_RATIO = 200  # longer by shorter side; resizing the shorter side would make the longer one enormous
SAMPLED_FILES = 32  # whose sizes stand for those of all files
STRIP_PIXELS = 2**20
MAX_JPEG_PIXELS = 16384 * 12288  # the largest phone cameras; above MAX_PIXELS they are decoded reduced


def read_image(path: str | Path, transform: Callable[[Image.Image], Any] | None = None) -> Any:
    """Open an image file and return what ``transform`` makes of it.

    Args:
        path: A file in one of ``FORMATS``.
        transform: Function of the opened image, which is not decoded yet. If None, ``rgb``.

    Raises:
        UserError: The file cannot be read, or is so large that it looks like a decompression bomb.
        MemoryError: There is too little memory.
    """
    return _apply(Path(path), lambda image: (transform or rgb)(in_bytes(image)))


def _apply(path: Path, function: Callable[[Image.Image], Any]) -> Any:
    """Open an image file and return what ``function`` makes of it; for errors see ``read_image``."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise OSError("it is not a file" if path.exists() else "there is no such file")
        # From a path, PIL maps uncompressed TIFF files into memory, which scrambles images that are rotated.
        with path.open("rb") as stream, _open(stream) as image:
            _check_size(image)
            return function(image)
    except MemoryError:  # the image may be sound
        raise
    except Exception as error:  # what a decoder raises on damaged bytes depends on the format
        raise UserError(f"cannot read the image {path}: {first_line(error)}") from None


def _open(stream: BinaryIO) -> Image.Image:
    try:
        return Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:  # its message describes the stream
        raise ValueError("it is damaged, or no image of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # PIL's limit is for all formats. A large JPEG is decoded reduced; ``_check_size`` has its limit.
        try:
            stream.seek(0)
            return JpegImageFile(stream)
        except SyntaxError:  # it is of another format
            raise error from None


def _file_size(path: str | Path) -> tuple[int, int] | None:
    """Return width and height of an image file, or None if it cannot be read."""
    try:
        return _apply(Path(path), lambda image: image.size)
    except UserError:
        return None


def median_side(files: Sequence[Path]) -> int | None:
    """Return the median of the shorter sides of some of the images, in pixels, None if none can be read."""
    some = files[:: max(1, len(files) // SAMPLED_FILES)][:SAMPLED_FILES]
    sides = [min(size) for size in map(_file_size, some) if size]
    return int(statistics.median(sides)) if sides else None


def _check_size(image: Image.Image) -> None:
    if max(image.size) > MAX_SIDES_RATIO * min(image.size):
        raise ValueError(f"its sides of {image.width} and {image.height} pixels differ too much")
    if image.width * image.height > (MAX_JPEG_PIXELS if image.format in ("JPEG", "MPO") else MAX_PIXELS):
        raise ValueError(f"its {image.width} x {image.height} pixels could be a decompression bomb")


def in_bytes(image: Image.Image) -> Image.Image:
    """Return an image of bytes; gray values of 16 or 32 bits, or floats, are scaled.

    The darkest value of the image becomes 0, the brightest 255. PIL would cut them off at 255.
    """
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)
    # In strips, as one copy of all values in float64 is eight times as large as the bytes.
    strips = np.array_split(values, -(-values.size // STRIP_PIXELS))
    limits = [(finite.min(), finite.max()) for finite in (x[np.isfinite(x)] for x in strips) if finite.size]
    low, high = (min(x for x, _ in limits), max(x for _, x in limits)) if limits else (0, 0)
    low, high = float(low), float(high)

    def scaled(strip: np.ndarray) -> np.ndarray:
        strip = strip.astype(np.float64)
        strip[~np.isfinite(strip)] = low
        share = (strip / 2 - low / 2) / (high / 2 - low / 2 or 1.0)
        return np.rint(255 * share).astype(np.uint8)

    gray = Image.fromarray(np.concatenate([scaled(strip) for strip in strips]))
    gray.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return gray


def ignore_pillow_warnings() -> None:
    """Ignore PIL's warnings about odd but readable files, in a program that names unreadable ones itself."""
    warnings.filterwarnings("ignore", module="PIL")
