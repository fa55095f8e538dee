"""The generated data set: reproducible, balanced, neither trivial nor uniform in difficulty."""

import pytest
import torch

from synthetic import CLASS_NAMES, generate


@pytest.fixture(scope="module")
def demo():
    return generate(1200, seed=3)


def nearest_class_mean_accuracy(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of the second half of ``features`` (N, D) that lie nearest to the mean of their own class in the first half."""
    half = len(labels) // 2
    means = torch.stack([features[:half][labels[:half] == c].mean(0) for c in range(len(CLASS_NAMES))])
    nearest = torch.cdist(features[half:], means).argmin(1)
    return 100 * (nearest == labels[half:]).double().mean().item()


def test_shapes_types_range_and_order(demo):
    images, labels = demo
    assert (images.shape, images.dtype) == ((1200, 3, 32, 32), torch.uint8)
    assert (labels.shape, labels.dtype) == ((1200,), torch.int64)
    assert images.min() < 20
    assert images.max() > 235
    assert abs((labels[1:] == labels[:-1]).double().mean().item() - 1 / len(CLASS_NAMES)) < 0.05


def test_the_seed_alone_decides(demo):
    state = torch.random.get_rng_state()
    images, labels = generate(1200, seed=3)
    assert torch.equal(images, demo[0])
    assert torch.equal(labels, demo[1])
    images, labels = generate(1200, seed=4)
    assert not torch.equal(labels, demo[1])
    seen = {image.numpy().tobytes() for image in demo[0]}
    assert len(seen) == 1200
    assert not any(image.numpy().tobytes() in seen for image in images)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("num_images", "image_size"), [(1, 16), (7, 33), (65, 64), (250, 32)])
def test_any_number_and_size_with_balanced_classes(num_images, image_size):
    images, labels = generate(num_images, seed=0, image_size=image_size)
    counts = torch.bincount(labels, minlength=len(CLASS_NAMES))
    assert images.shape == (num_images, 3, image_size, image_size)
    assert images.float().std() > 20
    assert len(labels) == num_images
    assert counts.max() - counts.min() <= 1


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="num_images is 0"):
        generate(0, seed=0)
    with pytest.raises(ValueError, match="image_size is 15"):
        generate(1, seed=0, image_size=15)


def test_difficulty_varies(demo):
    images = demo[0].float()
    roughness = (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(1).sort().values  # noise, clutter and edges
    assert roughness[-120:].mean() > 2.5 * roughness[:120].mean()
    contrast = images.flatten(2).std(2).norm(dim=1)
    assert contrast.quantile(0.9) > 1.4 * contrast.quantile(0.1)


def test_neither_mean_colour_nor_single_pixels_tell_the_class(demo):
    images, labels = demo[0].float(), demo[1]
    assert nearest_class_mean_accuracy(images.mean((2, 3)), labels) < 2 * 100 / len(CLASS_NAMES)
    assert nearest_class_mean_accuracy(images.flatten(1), labels) < 25
