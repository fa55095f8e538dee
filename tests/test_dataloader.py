"""Splits, augmentation, order, image folders, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import dataloader
import datasets
from args import parse
from dataloader import CROP_PADDING, Delivery, Shard, TrainingTransform, crop_and_flip, load_data
from datasets import choose_held_out, read_image
from utils import UserError

CPU = torch.device("cpu")


def folder_settings(root, *flags):
    return parse(
        "GE",
        [
            "--data",
            "folder",
            "--data-root",
            str(root),
            "--image-size",
            "32",
            "--val-size",
            "12",
            "--batch-size",
            "8",
            "--augment",
            "standard",
            *flags,
        ],
    ).settings()


def test_held_out_images_are_neither_trained_on_nor_augmented(image_folder):
    data = load_data(folder_settings(image_folder, "--limit-train", "40"), CPU)
    assert (data.train.num_images, data.val.num_images, data.test.num_images) == (40, 12, 15)
    trained = {image.numpy().tobytes() for image in data.train.images}
    held_out = {image.numpy().tobytes() for image in data.val.images}
    assert len(held_out) == 12
    assert not trained & held_out
    assert data.train.crops
    assert not data.val.crops
    assert not data.test.crops


def test_split_depends_on_its_own_seed_alone():
    assert torch.equal(choose_held_out(100, 10, 0), choose_held_out(100, 10, 0))
    assert not torch.equal(choose_held_out(100, 10, 0), choose_held_out(100, 10, 1))
    with pytest.raises(UserError, match="--val-size 100"):
        choose_held_out(100, 100, 0)


def test_normalised_by_the_training_images(tiny_demo):
    data = load_data(parse("GE", ["--val-size", "10"]).settings(), CPU)
    images = torch.cat([images for images, _ in data.train])
    assert images.mean((0, 2, 3)).abs().max() < 1e-3
    assert (images.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_crops_equal_torchvisions():
    """For every offset: the same pixels as padding and cropping one image with torchvision."""
    image = torch.randint(1, 256, (3, 8, 8), dtype=torch.uint8)
    side = 2 * CROP_PADDING + 1
    offsets = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    ours = crop_and_flip(image.expand(len(offsets), -1, -1, -1), offsets, torch.zeros(len(offsets), dtype=torch.bool))
    padded = v2.functional.pad(image, [CROP_PADDING] * 4)
    for window, (top, left) in zip(ours, offsets.tolist(), strict=True):
        assert torch.equal(window, v2.functional.crop(padded, top, left, 8, 8))


def test_flips_mirror_the_chosen_images():
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    centre = torch.full((4, 2), CROP_PADDING)
    flips = torch.tensor([True, False, True, False])
    ours = crop_and_flip(images, centre, flips)
    assert torch.equal(ours[1::2], images[1::2])
    assert torch.equal(ours[::2], images[::2].flip(-1))


def test_every_offset_and_flip_equally_likely(monkeypatch):
    seen = []
    monkeypatch.setattr(dataloader, "crop_and_flip", lambda images, offsets, flips: seen.append((offsets, flips)) or images)
    count = 40_000
    batches = dataloader.InMemoryBatches(
        torch.zeros(count, 3, 1, 1, dtype=torch.uint8),
        torch.zeros(count, dtype=torch.int64),
        Delivery(1000, "standard", 0, dataloader.Normalizer([0.5] * 3, [0.5] * 3, CPU), CPU),
    )
    list(batches.epoch(0))
    offsets, flips = (torch.cat(parts) for parts in zip(*seen, strict=True))
    side = 2 * CROP_PADDING + 1
    cells = torch.bincount((offsets[:, 0] * side + offsets[:, 1]) * 2 + flips, minlength=2 * side**2).double()
    expected = count / len(cells)
    chi_squared = ((cells - expected) ** 2 / expected).sum()
    assert len(cells) == 162
    assert chi_squared < 225  # 161 degrees of freedom: above it once in 2,000 seeds; this seed is fixed


def epoch_targets(batches, epoch, first_step=0):
    return [(images, targets) for images, targets in batches.epoch(epoch, first_step)]


@pytest.mark.parametrize(("size", "augment"), [("32", "standard"), ("80", "standard"), ("32", "trivial"), ("80", "randaugment")])
def test_order_is_a_function_of_seed_epoch_and_step(image_folder, size, augment):
    """In memory (32 pixels) and decoded by two workers (80 pixels): a fresh loader that starts at step 2 gives the rest, bit by bit."""
    flags = ["--image-size", size, "--augment", augment]
    first = load_data(folder_settings(image_folder, *flags, "--workers", "2"), CPU).train
    again = load_data(folder_settings(image_folder, *flags, "--workers", "0"), CPU).train
    whole, rest = epoch_targets(first, 3), epoch_targets(again, 3, first_step=2)
    assert len(whole) == 6
    for (images, targets), (images_again, targets_again) in zip(whole[2:], rest, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(targets, targets_again)
    other_epoch = epoch_targets(again, 4)
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(whole, other_epoch, strict=True))


@pytest.mark.parametrize("size", ["32", "80"])
def test_processes_share_every_batch_and_every_evaluation(image_folder, size):
    settings = folder_settings(image_folder, "--image-size", size, "--workers", "0")
    alone = load_data(settings, CPU)
    parts = [load_data(settings, CPU, Shard(rank, 2)) for rank in range(2)]
    for whole, *shares in zip(alone.train.epoch(0), *(p.train.epoch(0) for p in parts), strict=True):
        assert torch.equal(whole[0], torch.cat([images for images, _ in shares]))
        assert torch.equal(whole[1], torch.cat([targets for _, targets in shares]))
    counts = [sum(len(t) for _, t in part.test) for part in parts]
    assert counts == [8, 7]


@pytest.mark.parametrize("size", ["32", "80"])
def test_stronger_augmentation_changes_images_one_by_one(image_folder, size):
    flags = ["--image-size", size, "--workers", "0"]
    standard, stronger = (
        load_data(folder_settings(image_folder, *flags, "--augment", name), CPU).train for name in ("standard", "trivial")
    )
    changed = torch.cat([(a != b).flatten(1).any(dim=1) for (a, _), (b, _) in zip(standard.epoch(0), stronger.epoch(0), strict=True)])
    assert changed.float().mean() > 0.5  # one of TrivialAugment's operations, and the weakest of some others, is the identity


@pytest.mark.parametrize("large", [False, True])
def test_training_crops_agree_with_torchvisions(tmp_path, large):
    """The same windows as torchvision's transform draws; of a JPEG that is decoded reduced, to a pixel of the reduced image."""
    size, tolerance = ((1200, 900), 4.0) if large else ((100, 80), 1.0)
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(256, size=(2, 3, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "image.jpg", quality=95)
    ours, theirs = (
        TrainingTransform(64),
        v2.Compose([v2.RandomResizedCrop(64, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]),
    )
    for seed in range(20):
        torch.manual_seed(seed)
        crop = read_image(tmp_path / "image.jpg", ours)
        torch.manual_seed(seed)
        expected = theirs(read_image(tmp_path / "image.jpg"))
        assert crop.shape == expected.shape == (3, 64, 64)
        assert crop.dtype == torch.uint8
        assert (crop.int() - expected.int()).abs().float().mean() < tolerance


def test_batch_that_processes_cannot_share(image_folder):
    with pytest.raises(UserError, match="multiple"):
        load_data(folder_settings(image_folder), CPU, Shard(0, 3))


def test_missing_folders(tmp_path):
    with pytest.raises(UserError, match="train/CLASS"):
        load_data(folder_settings(tmp_path), CPU)


def test_cifar_without_archive_folders_or_network(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR100", offline)
    with pytest.raises(UserError, match="no cifar100 in --data-root"):
        load_data(parse("GE", ["--preset", "cifar100", "--data-root", str(tmp_path)]).settings(), CPU)


def test_empty_class_folder(image_folder):
    for path in (image_folder / "train" / "bee").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="bee holds no image"):
        load_data(folder_settings(image_folder), CPU)


def test_classes_that_differ(image_folder):
    (image_folder / "test" / "cat").rename(image_folder / "test" / "dog")
    with pytest.raises(UserError, match="cat, dog"):
        load_data(folder_settings(image_folder), CPU)


@pytest.mark.parametrize("size", ["32", "80"])
def test_unreadable_image_is_named(image_folder, size):
    broken = image_folder / "train" / "bee" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])

    def read_everything():
        data = load_data(folder_settings(image_folder, "--image-size", size, "--workers", "0"), CPU)
        return [batch for batches in (data.train.epoch(0), data.train.epoch(1), data.val) for batch in batches]

    with pytest.raises(UserError, match=r"bee/3\.png"):
        read_everything()


def test_decompression_bomb_is_refused(image_folder, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_PIXELS", 100)
    with pytest.raises(UserError, match="decompression bomb"):
        read_image(next((image_folder / "train" / "ant").iterdir()))


def test_other_data_than_the_checkpoints(image_folder):
    data = load_data(folder_settings(image_folder), CPU)
    same = load_data(folder_settings(image_folder), CPU, stored=data.info, held_out=data.held_out)
    assert same.info == data.info
    (image_folder / "train" / "ant" / "0.png").unlink()
    with pytest.raises(UserError, match="not those of the checkpoint"):
        load_data(folder_settings(image_folder), CPU, stored=data.info, held_out=data.held_out)


def test_batch_larger_than_the_training_images(image_folder):
    with pytest.raises(UserError, match="--batch-size 64"):
        load_data(folder_settings(image_folder, "--batch-size", "64"), CPU)


def test_val_folder_serves_as_test(image_folder):
    (image_folder / "test").rename(image_folder / "val")
    assert load_data(folder_settings(image_folder), CPU).test.num_images == 15
