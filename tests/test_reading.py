"""Reading image files, and the transforms of evaluation and training."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from image_data import reading, transforms
from image_data.reading import read_image
from image_data.transforms import (
    CROP_PADDING,
    DrawsFrom,
    TrainingTransform,
    crop_and_flip,
    evaluation_transform,
    make_augmentation,
)
from utils import UserError


@pytest.mark.parametrize("large", [False, True])
def test_training_crops_agree_with_torchvisions(tmp_path, large):
    """The same windows as torchvision's transform draws; of a JPEG that is decoded reduced, to a pixel of the
    reduced image."""
    size, tolerance = ((1200, 900), 4.0) if large else ((100, 80), 1.0)
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(256, size=(2, 3, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    smooth.save(tmp_path / "image.jpg", quality=95)
    theirs = v2.Compose(
        [v2.RandomResizedCrop(64, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    for seed in range(20):
        with DrawsFrom(torch.Generator().manual_seed(seed)):
            crop = read_image(tmp_path / "image.jpg", TrainingTransform(64))
        torch.manual_seed(seed)
        expected = theirs(read_image(tmp_path / "image.jpg"))
        assert crop.shape == expected.shape == (3, 64, 64)
        assert crop.dtype == torch.uint8
        assert (crop.int() - expected.int()).abs().float().mean() < tolerance


@pytest.mark.parametrize("augment", ["trivial", "randaugment"])
def test_augmentation_draws_from_its_own_generator(augment):
    """The same operations as torchvision draws with its seed; torch's global state stays as it is."""
    image = torch.randint(256, (3, 40, 40), dtype=torch.uint8)
    policy, state = make_augmentation(augment), torch.get_rng_state()
    for seed in range(60):
        with DrawsFrom(torch.Generator().manual_seed(seed)):
            ours = policy(image)
        assert torch.equal(torch.get_rng_state(), state)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            assert torch.equal(ours, policy(image))


def test_crops_and_flips_equal_torchvisions():
    """For every offset, every second one mirrored: the same pixels as padding and cropping one image with
    torchvision."""
    image = torch.randint(1, 256, (3, 8, 8), dtype=torch.uint8)
    side = 2 * CROP_PADDING + 1
    offsets = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    flips = torch.arange(len(offsets)) % 2 == 1
    padded = v2.functional.pad(image, [CROP_PADDING] * 4)
    ours = crop_and_flip(image.expand(len(offsets), -1, -1, -1), offsets, flips)
    for window, (top, left), flip in zip(ours, offsets.tolist(), flips, strict=True):
        expected = v2.functional.crop(padded, top, left, 8, 8)
        assert torch.equal(window, expected.flip(-1) if flip else expected)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_keep_their_contrast(tmp_path, mode):
    ramp = np.arange(64, dtype=np.float64).reshape(8, 8)
    values = {
        "I;16": (1000 * ramp).astype(np.uint16),
        "I": (10**6 * ramp - 10**7).astype(np.int32),
        "F": (ramp / 63).astype(np.float32),
    }
    Image.fromarray(values[mode]).save(tmp_path / "deep.tif")
    pixels = read_image(tmp_path / "deep.tif", evaluation_transform(8, 1.0))
    assert torch.equal(pixels[0], torch.from_numpy(np.rint(255 * ramp / 63).astype(np.uint8)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_images_are_turned_upright(tmp_path, suffix):
    """Every row of the upright image is of one colour; so is every row of a crop."""
    exif = Image.Exif()
    exif[274] = 6
    upright = np.repeat(np.linspace(0, 255, 400).astype(np.uint8)[:, None, None], 300, axis=1).repeat(
        3, axis=2
    )
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(
        tmp_path / f"photo.{suffix}", exif=exif
    )
    for transform in (evaluation_transform(64, 1.0), TrainingTransform(64)):
        rows = read_image(tmp_path / f"photo.{suffix}", transform).float().mean(dim=0)
        assert rows.std(dim=1).max() < 2
        assert rows[-1].mean() > rows[0].mean() + 10


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA", "CMYK"])
def test_uncompressed_images_are_turned_upright(tmp_path, mode):
    """Pixel by pixel: an image in memory, and the same one turned with the orientation that turns it back."""
    upright = np.arange(8 * 6).reshape(8, 6) * (1000 if mode == "I;16" else 5)
    image = Image.fromarray(upright.astype(np.uint16 if mode == "I;16" else np.uint8))
    image = image if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "upright.tif")
    exif = Image.Exif()
    exif[274] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.tif", exif=exif)
    pixels = [np.asarray(read_image(tmp_path / name)) for name in ("upright.tif", "turned.tif")]
    assert pixels[0].shape == (8, 6, 3)
    assert len(np.unique(pixels[0])) > 40
    np.testing.assert_array_equal(*pixels)


def test_photographs_of_many_pixels(tmp_path, monkeypatch):
    for module in (reading, transforms):
        monkeypatch.setattr(module, "MAX_PIXELS", 10**6)
    monkeypatch.setattr(transforms, "REDUCED_SIDE", 256)
    sizes = []
    for suffix in ("jpg", "png"):
        Image.new("RGB", (2000, 1500), (90, 120, 30)).save(tmp_path / f"large.{suffix}")
    read_image(tmp_path / "large.jpg", lambda image: sizes.append(transforms.rgb(image).size))
    assert sizes == [(500, 375)]
    with pytest.raises(UserError, match="decompression bomb"):
        read_image(tmp_path / "large.png")


def test_a_jpeg_may_be_too_large_too(tmp_path, monkeypatch):
    assert reading.MAX_JPEG_PIXELS // 10**6 == 201  # as docs/usage.md says
    monkeypatch.setattr(reading, "MAX_JPEG_PIXELS", 10**6)
    Image.new("RGB", (2000, 1500), (90, 120, 30)).save(tmp_path / "large.jpg")
    with pytest.raises(UserError, match="decompression bomb"):
        read_image(tmp_path / "large.jpg")


def test_only_a_jpeg_may_be_larger_than_pil_allows(tmp_path, monkeypatch):
    """And PIL's limit stays as the program that calls us set it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for suffix in ("jpg", "png"):
        Image.new("RGB", (60, 50), (90, 120, 30)).save(tmp_path / f"large.{suffix}")
    assert read_image(tmp_path / "large.jpg").size == (60, 50)
    with pytest.raises(UserError, match="decompression bomb"):
        read_image(tmp_path / "large.png")
    assert Image.MAX_IMAGE_PIXELS == 1000
    # Between the limit and twice the limit PIL warns, and a program may turn that into an error.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "large.jpg").size == (60, 50)


def test_too_little_memory_is_not_the_fault_of_the_image(tmp_path):
    Image.new("RGB", (60, 50)).save(tmp_path / "image.png")

    def transform(image):
        raise MemoryError

    with pytest.raises(MemoryError):
        read_image(tmp_path / "image.png", transform)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path, kind):
    """Whatever colour hides behind them; alike in training and in evaluation."""
    pixels = np.zeros((100, 100, 4), np.uint8)
    pixels[:, :, 0], pixels[50:, :, 3] = 200, 255
    image = Image.fromarray(pixels)
    if kind == "P":
        image = Image.fromarray((pixels[:, :, 3] > 0).astype(np.uint8), "P")
        image.putpalette([200, 0, 0, 10, 20, 30])
        image.save(tmp_path / "image.png", transparency=0)
    else:
        image.convert(kind).save(tmp_path / "image.png")
    for transform in (evaluation_transform(100, 1.0), TrainingTransform(100)):
        found = read_image(tmp_path / "image.png", transform)
        assert found.max() == 255
        assert torch.equal(found[0] == 255, found[2] == 255)
    assert read_image(tmp_path / "image.png").getpixel((5, 5)) == (255, 255, 255)
