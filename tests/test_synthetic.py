"""The generated data set: reproducible, balanced, of any size."""

import hashlib

import pytest
import torch

from image_data.synthetic import CLASS_NAMES, generate


def test_the_seed_alone_decides():
    """Bit for bit on every machine; a change of these images changes every figure of the demo."""
    state = torch.random.get_rng_state()
    images, labels = generate(1200, seed=3)
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == (
        (1200, 3, 32, 32),
        torch.uint8,
        (1200,),
        torch.int64,
    )
    assert hashlib.sha256(images.numpy()).hexdigest()[:16] == "83515661d9009e98"
    assert abs((labels[1:] == labels[:-1]).double().mean().item() - 1 / len(CLASS_NAMES)) < 0.05
    others, _ = generate(1200, seed=4)
    seen = {image.numpy().tobytes() for image in images}
    assert len(seen) == 1200
    assert not any(image.numpy().tobytes() in seen for image in others)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("num_images", "image_size"), [(1, 16), (7, 33), (65, 64), (250, 32)])
def test_any_number_and_size_with_balanced_classes(num_images, image_size):
    images, labels = generate(num_images, seed=0, image_size=image_size)
    counts = torch.bincount(labels, minlength=len(CLASS_NAMES))
    assert images.shape == (num_images, 3, image_size, image_size)
    assert images.float().std() > 20
    assert len(labels) == num_images
    assert counts.max() - counts.min() <= 1
