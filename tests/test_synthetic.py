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


def roughness(images: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference (N,) between horizontal neighbours: noise, clutter and edges."""
    return (images[..., 1:].float() - images[..., :-1].float()).abs().flatten(1).mean(1)


def test_shapes_types_and_range(demo):
    images, labels = demo
    assert images.shape == (1200, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.shape == (1200,)
    assert labels.dtype == torch.int64
    assert images.min() < 20
    assert images.max() > 235
    assert 8 <= len(CLASS_NAMES) <= 12
    assert len(set(CLASS_NAMES)) == len(CLASS_NAMES)


def test_same_seed_same_bits(demo):
    torch.manual_seed(0)
    images, labels = generate(1200, seed=3)
    assert torch.equal(images, demo[0])
    assert torch.equal(labels, demo[1])


def test_the_global_random_state_is_left_alone():
    state = torch.random.get_rng_state()
    generate(10, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_seed_other_images(demo):
    images, labels = generate(1200, seed=4)
    assert not torch.equal(labels, demo[1])
    seen = {image.numpy().tobytes() for image in demo[0]}
    assert len(seen) == 1200
    assert not any(image.numpy().tobytes() in seen for image in images)


@pytest.mark.parametrize("num_images", [1, 7, 65, 250])
def test_classes_are_balanced(num_images):
    images, labels = generate(num_images, seed=0)
    counts = torch.bincount(labels, minlength=len(CLASS_NAMES))
    assert len(images) == len(labels) == num_images
    assert counts.max() - counts.min() <= 1


def test_order_is_shuffled(demo):
    repeats = (demo[1][1:] == demo[1][:-1]).double().mean().item()
    assert abs(repeats - 1 / len(CLASS_NAMES)) < 0.05


@pytest.mark.parametrize("image_size", [16, 33, 64])
def test_image_size(image_size):
    images, _ = generate(24, seed=0, image_size=image_size)
    assert images.shape == (24, 3, image_size, image_size)
    assert images.float().std() > 20


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="num_images is 0"):
        generate(0, seed=0)
    with pytest.raises(ValueError, match="image_size is 15"):
        generate(1, seed=0, image_size=15)


def test_difficulty_varies(demo):
    rough = roughness(demo[0]).sort().values
    assert rough[-120:].mean() > 2.5 * rough[:120].mean()
    contrast = demo[0].float().flatten(2).std(2).norm(dim=1)
    assert contrast.quantile(0.9) > 1.4 * contrast.quantile(0.1)


def test_mean_colour_does_not_tell_the_class(demo):
    images, labels = demo
    accuracy = nearest_class_mean_accuracy(images.float().mean((2, 3)), labels)
    assert accuracy < 2 * 100 / len(CLASS_NAMES)


def test_pixels_do_not_tell_the_class_linearly(demo):
    images, labels = demo
    assert nearest_class_mean_accuracy(images.float().flatten(1), labels) < 25
