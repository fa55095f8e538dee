"""From an image to the bytes that a network sees: fixed for evaluation, random for training.

Example:
    pixels = read_image(path, evaluation_transform(224, crop_share=0.875))   # bytes (3, 224, 224)
    with DrawsFrom(torch.Generator().manual_seed(1)):
        pixels = read_image(path, TrainingTransform(224, "trivial"))       # a function of the seed alone
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision import transforms
from torchvision.transforms import v2

MAX_PIXELS = 89_478_485  # of an image that is decoded in full; PIL's own limit
REDUCED_SIDE = 1024  # pixels that a reduced JPEG keeps at least
BACKGROUND = (255, 255, 255)  # behind transparent pixels
CROP_PADDING = 4  # pixels around small images, from which training crops
# Random resized crops: share of the image, and width by height.
CROP_AREAS, CROP_RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)


class DrawsFrom(TorchFunctionMode):
    """A block in which torchvision draws from ``generator`` instead of torch's global one, in this thread.

    Threads share the global generator; numbers drawn from it would depend on which thread is first.
    """

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Add ``generator`` to the calls that draw."""
        kwargs = kwargs or {}
        if function in (torch.rand, torch.randint, torch.Tensor.uniform_):
            kwargs = {"generator": self.generator, **kwargs}
        return function(*args, **kwargs)


Transform = Callable[[Image.Image], Tensor]


def evaluation_transform(image_size: int, crop_share: float, interpolation: str = "bilinear") -> Transform:
    """Return a transform: opened image -> bytes (3, image_size, image_size), the centre of the resized image.

    Args:
        image_size: Height and width of the result.
        crop_share: The share of the shorter side that is kept.
        interpolation: Value of a torchvision ``InterpolationMode``, such as ``bicubic``.
    """
    mode, resized = v2.InterpolationMode(interpolation), round(image_size / crop_share)
    resize = v2.Compose([v2.Resize(resized, interpolation=mode, antialias=True), v2.CenterCrop(image_size)])

    def transform(image: Image.Image) -> Tensor:
        image = rgb(image)
        if image.size != (image_size, image_size) or resized != image_size:
            image = resize(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    return transform


class TrainingTransform:
    """Opened image -> bytes (3, image_size, image_size): random crop, flip, and the augmentation ``augment``.

    Only what the crop needs is decoded, and PyTorch resizes bytes faster than PIL does.
    """

    def __init__(self, image_size: int, augment: str = "standard", interpolation: str = "bilinear"):
        self.image_size, self.augmentation = image_size, make_augmentation(augment)
        # PyTorch resizes bytes by these two.
        smooth = "bilinear" if interpolation == "bilinear" else "bicubic"
        self.interpolation = v2.InterpolationMode(smooth)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return a random crop."""
        top, left, height, width = transforms.RandomResizedCrop.get_params(image, CROP_AREAS, CROP_RATIOS)
        # A JPEG is decoded at 1/2, 1/4 or 1/8 if the crop then still has enough pixels, others in full.
        full_width = image.width
        enough = tuple(math.ceil(side * self.image_size / min(height, width)) for side in image.size)
        image.draft(None, enough)
        reduction = round(full_width / image.width)
        top, left, height, width = (n // reduction for n in (top, left, height, width))
        # Turn the crop upright, not the image: crops of both orientations are equally likely.
        crop = rgb(image.crop((left, top, left + width, top + height)))
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            # Without these instructions PIL is twice as fast.
            resampling = Image.Resampling[self.interpolation.name]
            crop = crop.resize((self.image_size, self.image_size), resampling)
        crop = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
        size = [self.image_size, self.image_size]
        crop = v2.functional.resize(crop, size, interpolation=self.interpolation, antialias=True)
        if torch.rand(()) < 0.5:
            crop = crop.flip(-1)
        return crop if self.augmentation is None else self.augmentation(crop)


def make_augmentation(augment: str) -> v2.Transform | None:
    """Return the transform that ``--augment`` adds to crops and flips, None for ``standard`` and ``none``."""
    augmentations = {"trivial": v2.TrivialAugmentWide, "randaugment": v2.RandAugment}
    return augmentations[augment]() if augment in augmentations else None


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Pad with ``CROP_PADDING`` black pixels, cut windows of the old size, and mirror some.

    Args:
        images: Images (N, C, H, W).
        offsets: Row and column of each window in the padded image, (N, 2), from 0 to 2 * CROP_PADDING.
        flips: True for every image to mirror left to right, bool (N,).
    """
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, [CROP_PADDING] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, rows, columns, H, W)
    cropped = windows[torch.arange(len(images), device=images.device), :, offsets[:, 0], offsets[:, 1]]
    return torch.where(flips[:, None, None, None], cropped.flip(-1), cropped)


def rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB, upright as its EXIF data say.

    Behind transparent pixels is the ``BACKGROUND``. JPEGs of more than ``MAX_PIXELS`` are reduced while they
    are decoded.
    """
    if image.width * image.height > MAX_PIXELS:
        image.draft(None, (REDUCED_SIDE, REDUCED_SIDE))
    image.load()
    with suppress(Exception):  # damaged EXIF data are no reason to lose the image
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image.convert("RGB")
    if image.mode == "La":  # which PIL converts to no other mode
        image = image.convert("LA")
    image = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, BACKGROUND)
    opaque.paste(image, mask=image.getchannel("A"))
    return opaque
