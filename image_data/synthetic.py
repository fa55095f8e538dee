"""The data set ``demo``: images the program draws itself, for trying everything out without a download.

An image shows one object, and its class is the object's outline (global structure) and fill (fine structure)
together. Images differ widely in difficulty: a large shape in strong colours on a plain background is clear
to the first exit; a small, faint, partly hidden one among smaller decoys of other classes and the same colour
needs a deep one.

Example:
    images, labels = generate(8000, seed=0)  # uint8 (8000, 3, 32, 32), int64 (8000,)
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray

OUTLINES = ("circle", "square", "triangle", "cross")
FILLS = ("solid", "hollow", "striped")
CLASS_NAMES: tuple[str, ...] = tuple(f"{fill} {outline}" for outline in OUTLINES for fill in FILLS)

EASY_SHARE = 0.36  # of the images
MAX_RADIUS, MIN_RADIUS = 0.80, 0.44  # of the object, in half image sides
MAX_CONTRAST, MIN_CONTRAST = 0.80, 0.35  # between object and background, 1 being black against white
MAX_NOISE = 0.10  # half width of the pixel noise
MAX_BARS = 2  # drawn across the image; the last one hides a part of the object
MAX_DECOYS = 2  # smaller shapes of other classes beside the object
DECOY_RADIUS = 0.60  # in object radii
STRIPES = 2.5  # periods a radius
EDGE = 0.28  # thickness of a hollow shape, in radii

DEMO_IMAGES = {"train": 13000, "test": 2000}
DEMO_SEEDS = {"train": 1, "test": 2}

# Images drawn at a time: their intermediate results stay in the processor's cache. Another number draws other
# images.
CHUNK = 64


def demo(subset: str, image_size: int) -> tuple[Tensor, Tensor]:
    """Draw the images and labels of the demo's subset ``train`` or ``test``."""
    return generate(DEMO_IMAGES[subset], DEMO_SEEDS[subset], image_size)


def generate(num_images: int, seed: int, image_size: int = 32) -> tuple[Tensor, Tensor]:
    """Draw labelled images; the same arguments give the same bits on every machine.

    Only operations that IEEE arithmetic rounds exactly (no sine, no exponential) touch a pixel.

    Args:
        num_images: Number of images N, at least 1.
        seed: Seed of this data set's own generator; another one gives other images of the same kind.
        image_size: Height and width in pixels. Everything in the image scales with it.

    Returns:
        Images, uint8 (N, 3, H, W), and labels, int64 (N,), in random order; numbers of images of two classes
        differ by at most 1.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num_images) % len(CLASS_NAMES))
    images = np.empty((num_images, 3, image_size, image_size), np.uint8)
    for start in range(0, num_images, CHUNK):
        chunk = slice(start, start + CHUNK)
        images[chunk] = _draw(labels[chunk], image_size, rng)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def _draw(labels: Array, image_size: int, rng: np.random.Generator) -> Array:
    """Draw images, uint8 (n, 3, H, W), of the classes ``labels`` (n,)."""
    n = len(labels)

    def uniform(low: float | Array, high: float | Array, *shape: int) -> Array:
        return (low + (high - low) * rng.random((n, *shape))).astype(np.float32)

    def harder(easy: float, hard: float) -> Array:
        """Return a property (n,) between its easy and its hard end, loosely by difficulty."""
        mixed = np.clip(difficulty + uniform(-0.2, 0.2), 0, 1)
        return easy + (hard - easy) * mixed

    # Most images are easy, the others hard: images of medium difficulty would suit any exit.
    difficulty = np.where(rng.random(n) < EASY_SHARE, uniform(0, 0.35), uniform(0.5, 0.9)).astype(np.float32)
    radius = harder(MAX_RADIUS, MIN_RADIUS)
    contrast = harder(MAX_CONTRAST, MIN_CONTRAST)
    noise = harder(0, MAX_NOISE)
    num_bars = np.floor(harder(0, MAX_BARS + 0.99))
    num_decoys = np.floor(harder(0, MAX_DECOYS + 0.99))

    def shape_coverage(shape_labels: Array, centre: Array, shape_radius: Array) -> Array:
        x, y = _local_coordinates(image_size, centre, shape_radius, _directions(uniform(-1, 1, 2)))
        distance = _shape_distance(shape_labels, x, y)
        return _coverage(distance * shape_radius[:, None, None], image_size)

    def bar_coverage(shown: Array) -> Array:
        x, _ = _local_coordinates(
            image_size, uniform(-0.8, 0.8, 2), np.ones(n, np.float32), _directions(uniform(-1, 1, 2))
        )
        return _coverage(np.abs(x) - uniform(0.03, 0.10, 1, 1), image_size) * shown[:, None, None]

    # The object is the brighter one in every colour, by random shares; the random middle keeps brightness
    # from telling the class.
    towards = _directions(uniform(0, 1, 3))
    middle = uniform(0.35, 0.65, 3)
    background = middle - towards * contrast[:, None] * 0.5
    foreground = middle + towards * contrast[:, None] * 0.5
    canvas = np.broadcast_to(background[:, :, None, None], (n, 3, image_size, image_size)).copy()

    centre = uniform(-1, 1, 2) * (1 - radius)[:, None]
    for decoy in range(MAX_DECOYS):
        other_labels = (labels + rng.integers(1, len(CLASS_NAMES), n)) % len(CLASS_NAMES)
        beside = centre + _directions(uniform(-1, 1, 2)) * (radius * 1.35)[:, None]
        coverage = shape_coverage(other_labels, beside, radius * DECOY_RADIUS)
        _paint(canvas, coverage * (num_decoys > decoy)[:, None, None], foreground)
    for bar in range(MAX_BARS - 1):
        _paint(canvas, bar_coverage(num_bars > bar), uniform(0.2, 0.8, 3))
    _paint(canvas, shape_coverage(labels, centre, radius), foreground)
    _paint(canvas, bar_coverage(num_bars > MAX_BARS - 1), uniform(0.2, 0.8, 3))

    canvas += (2 * rng.random(canvas.shape, np.float32) - 1) * noise[:, None, None, None]
    return np.rint(np.clip(canvas, 0, 1) * np.float32(255)).astype(np.uint8)


def _paint(canvas: Array, coverage: Array, colour: Array) -> None:
    """Lay ``colour`` (n, 3) over ``canvas`` (n, 3, H, W) where ``coverage`` (n, H, W) is 1."""
    canvas += (colour[:, :, None, None] - canvas) * coverage[:, None]


def _directions(vectors: Array) -> Array:
    """Scale random vectors (n, d) to unit vectors."""
    squares = vectors * vectors
    length = np.sqrt(sum(squares[:, i] for i in range(squares.shape[1])) + np.float32(1e-6))
    return vectors / length[:, None]


def _local_coordinates(
    image_size: int, centre: Array, radius: Array, direction: Array
) -> tuple[Array, Array]:
    """Return pixel positions in the frame of a shape, (n, H, W) each.

    The frame is centred, x runs along ``direction``, and the unit is the radius.
    """
    pixel = (np.arange(image_size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / image_size) - 1
    x = (pixel[None, :] - centre[:, :1])[:, None, :]
    y = (pixel[None, :] - centre[:, 1:])[:, :, None]
    cosine, sine = (direction / radius[:, None]).T[:, :, None, None]
    return x * cosine + y * sine, y * cosine - x * sine


def _coverage(distance: Array, image_size: int) -> Array:
    """Return the share of each pixel that a shape covers, which smooths its edge.

    Args:
        distance: Signed distance to the edge, negative inside, in half image sides.
        image_size: Height and width in pixels.
    """
    return np.clip(np.float32(0.5) - distance * np.float32(image_size / 2), 0, 1)


def _shape_distance(labels: Array, x: Array, y: Array) -> Array:
    """Return the signed distance (n, H, W) to the edges of shapes, negative inside, in radii.

    Args:
        labels: Classes of the shapes, (n,).
        x: Horizontal positions in the frames of the shapes, (n, H, W).
        y: Vertical positions in the frames of the shapes, (n, H, W).
    """
    outline, fill = labels // len(FILLS), labels % len(FILLS)
    distance = np.empty_like(x)
    for index, name in enumerate(OUTLINES):
        chosen = outline == index
        distance[chosen] = _OUTLINE_DISTANCE[name](x[chosen], y[chosen])
    hollow, striped = fill == FILLS.index("hollow"), fill == FILLS.index("striped")
    distance[hollow] = np.abs(distance[hollow] + EDGE / 2) - EDGE / 2
    phase = x[striped] * STRIPES
    stripes = (np.abs(phase - np.floor(phase) - np.float32(0.5)) - np.float32(0.25)) / STRIPES
    distance[striped] = np.maximum(distance[striped], stripes)
    return distance


def _circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - np.float32(0.95)


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.82)


def _triangle(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x) * np.float32(math.sqrt(0.75)) + y * np.float32(0.5), -y) - np.float32(0.55)


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - np.float32(0.38))


_OUTLINE_DISTANCE: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}
