"""Splits, augmentation, order, image folders, and what is refused."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import dataloader
from args import parse
from dataloader import CROP_PADDING, Shard, TrainingTransform, crop_and_flip, load_data
from image_data import sources as datasets
from image_data.sources import choose_held_out, read_image
from utils import UserError

CPU = torch.device("cpu")


FOLDER = [
    "--data",
    "folder",
    "--image-size",
    "32",
    "--val-size",
    "12",
    "--batch-size",
    "8",
    "--augment",
    "standard",
]


def folder_settings(root, *flags):
    return parse("GE", [*FOLDER, "--data-root", str(root), *flags]).settings()


def test_held_out_images_are_neither_trained_on_nor_augmented(image_folder):
    data = load_data(folder_settings(image_folder), CPU)
    assert (data.train.num_images, data.val.num_images, data.test.num_images) == (48, 12, 15)
    trained = {image.numpy().tobytes() for image in data.train.images}
    held_out = {image.numpy().tobytes() for image in data.val.images}
    assert len(held_out) == 12
    assert not trained & held_out
    assert [part.augment for part in (data.train, data.val, data.test)] == ["standard", "none", "none"]


def test_split_depends_on_its_own_seed_alone():
    assert torch.equal(choose_held_out(100, 10, 0), choose_held_out(100, 10, 0))
    assert not torch.equal(choose_held_out(100, 10, 0), choose_held_out(100, 10, 1))
    assert (
        len(choose_held_out(120, parse("GE", ["--data", "folder"]).settings().val_size, 0)) == 12
    )  # a tenth
    with pytest.raises(UserError, match="--val-size 100"):
        choose_held_out(100, 100, 0)


def test_normalised_by_the_training_images(tiny_demo):
    data = load_data(parse("GE", ["--val-size", "10"]).settings(), CPU)
    images = torch.cat([images for images, _ in data.train])
    assert images.mean((0, 2, 3)).abs().max() < 1e-3
    assert (images.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_crops_and_flips_equal_torchvisions():
    """For every offset, every second one mirrored: the same pixels as padding and cropping one image with torchvision."""
    image = torch.randint(1, 256, (3, 8, 8), dtype=torch.uint8)
    side = 2 * CROP_PADDING + 1
    offsets = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    flips = torch.arange(len(offsets)) % 2 == 1
    padded = v2.functional.pad(image, [CROP_PADDING] * 4)
    ours = crop_and_flip(image.expand(len(offsets), -1, -1, -1), offsets, flips)
    for window, (top, left), flip in zip(ours, offsets.tolist(), flips, strict=True):
        expected = v2.functional.crop(padded, top, left, 8, 8)
        assert torch.equal(window, expected.flip(-1) if flip else expected)


def test_every_offset_and_flip_equally_likely(monkeypatch):
    seen, count = [], 40_000
    monkeypatch.setattr(
        dataloader, "crop_and_flip", lambda images, offsets, flips: seen.append((offsets, flips)) or images
    )
    images, targets = torch.zeros(count, 3, 1, 1, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)
    settings, normalize = (
        parse("GE", ["--batch-size", "1000", "--seed", "0"]).settings(),
        dataloader.Normalizer([0.5] * 3, [0.5] * 3, CPU),
    )
    list(dataloader.InMemoryBatches(images, targets, settings, "standard", normalize, Shard()).epoch(0))
    offsets, flips = (torch.cat(parts) for parts in zip(*seen, strict=True))
    side = 2 * CROP_PADDING + 1
    cells = torch.bincount((offsets[:, 0] * side + offsets[:, 1]) * 2 + flips, minlength=2 * side**2).double()
    expected = count / len(cells)
    assert len(cells) == 162
    assert (
        (cells - expected) ** 2 / expected
    ).sum() < 225  # 161 degrees of freedom: above it once in 2,000 seeds; this seed is fixed


@pytest.mark.parametrize(
    ("size", "augment"), [("32", "standard"), ("80", "standard"), ("32", "trivial"), ("80", "randaugment")]
)
def test_order_is_a_function_of_seed_epoch_and_step(image_folder, size, augment):
    """In memory (32 pixels) and decoded by two workers (80 pixels): a fresh loader that starts at step 2 gives the rest, bit by bit."""
    flags = ["--image-size", size, "--augment", augment]
    first = load_data(folder_settings(image_folder, *flags, "--workers", "2"), CPU).train
    again = load_data(folder_settings(image_folder, *flags, "--workers", "0"), CPU).train
    whole, rest = list(first.epoch(3)), list(again.epoch(3, 2))
    assert len(whole) == 6
    for (images, targets), (images_again, targets_again) in zip(whole[2:], rest, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(targets, targets_again)
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(whole, again.epoch(4), strict=True))


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
    none = load_data(folder_settings(image_folder, "--val-size", "0"), CPU, Shard(1, 2)).val
    assert (none.num_images, len(none.own())) == (0, 0)


@pytest.mark.parametrize("size", ["32", "80"])
def test_stronger_augmentation_changes_images_one_by_one(image_folder, size):
    flags = ["--image-size", size, "--workers", "0", "--augment"]
    epochs = (
        load_data(folder_settings(image_folder, *flags, name), CPU).train.epoch(0)
        for name in ("standard", "trivial")
    )
    changed = torch.cat([(a != b).flatten(1).any(dim=1) for (a, _), (b, _) in zip(*epochs, strict=True)])
    assert (
        changed.float().mean() > 0.5
    )  # one of TrivialAugment's operations, and the weakest of some others, is the identity


@pytest.mark.parametrize("large", [False, True])
def test_training_crops_agree_with_torchvisions(tmp_path, large):
    """The same windows as torchvision's transform draws; of a JPEG that is decoded reduced, to a pixel of the reduced image."""
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
        torch.manual_seed(seed)
        crop = read_image(tmp_path / "image.jpg", TrainingTransform(64))
        torch.manual_seed(seed)
        expected = theirs(read_image(tmp_path / "image.jpg"))
        assert crop.shape == expected.shape == (3, 64, 64)
        assert crop.dtype == torch.uint8
        assert (crop.int() - expected.int()).abs().float().mean() < tolerance


def test_what_cannot_be_loaded_is_named(image_folder):
    def refused(words, *flags, root=image_folder, shard=None):
        with pytest.raises(UserError, match=words):
            load_data(folder_settings(root, *flags), CPU, shard)

    refused("multiple", shard=Shard(0, 3))
    refused("--batch-size 64", "--batch-size", "64")
    refused("train/CLASS", root=image_folder / "train")
    for path in (image_folder / "train" / "bee").iterdir():
        path.unlink()
    refused("bee holds no image")


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("size", ["32", "80"])
def test_unreadable_image_is_named_or_skipped(image_folder, size, part):
    """Before the first epoch ends; with the flag every other image is there, and the split that of all images."""
    flags = ["--image-size", size, "--workers", "0"]
    whole = load_data(folder_settings(image_folder, *flags), CPU)
    broken = image_folder / part / "bee" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])

    def first_epoch(*more):
        data = load_data(folder_settings(image_folder, *flags, *more), CPU)
        return data, [batch for batches in (data.train.epoch(0), data.val) for batch in batches]

    with pytest.raises(UserError, match=r"bee/3\.png.*--skip-unreadable"):
        first_epoch()
    data, _ = first_epoch("--skip-unreadable")
    assert sum(part.num_images for part in (data.train, data.val, data.test)) == 74
    assert torch.equal(data.split.held_out, whole.split.held_out)
    assert any("bee/3.png" in note for note in data.notes)


def test_images_that_go_or_come_leave_the_split_as_it_is(image_folder):
    """No image of one part ever comes into another one; other data are refused."""
    settings = folder_settings(image_folder)
    before = load_data(settings, CPU)
    remembered = {"stored": before.info, "split": before.split}
    ants = image_folder / "train" / "ant"
    (ants / "0.png").unlink()
    (ants / "5.png").rename(ants / "00.png")
    after = load_data(settings, CPU, **remembered)
    assert (after.info, after.train.num_images + after.val.num_images) == (before.info, 58)
    for part in ("train", "val"):
        pixels = [
            {image.numpy().tobytes() for image in getattr(data, part).images} for data in (before, after)
        ]
        assert pixels[1] < pixels[0] or pixels[1] == pixels[0]
    with pytest.raises(UserError, match="not those of the checkpoint"):
        load_data(
            settings, CPU, **{**remembered, "split": before.split._replace(names=before.split.names[:0])}
        )
    for i in range(6, 12):
        (ants / f"{i}.png").unlink()
    with pytest.raises(UserError, match="not those of the checkpoint"):
        load_data(settings, CPU, **remembered)


def test_test_images_are_where_the_classes_are(image_folder):
    (image_folder / "test").rename(image_folder / "val")
    assert load_data(folder_settings(image_folder), CPU).test.num_images == 15
    (image_folder / "test" / "all").mkdir(parents=True)
    next((image_folder / "val" / "ant").iterdir()).rename(image_folder / "test" / "all" / "0.png")
    data = load_data(folder_settings(image_folder), CPU)
    assert data.test.num_images == 14
    assert "val" in data.notes[0]
    (image_folder / "test" / "all").rename(image_folder / "test" / "ant")
    with pytest.raises(UserError, match="bee, cat"):
        load_data(folder_settings(image_folder), CPU)
    assert load_data(folder_settings(image_folder, "--data", "imagenet"), CPU).test.num_images == 14


def test_only_visible_images_are_read_and_others_counted(image_folder, monkeypatch):
    """Alike in training and prediction: links are followed, each real folder once, and a closed folder is named."""
    ants = image_folder / "train" / "ant"
    image = (ants / "0.png").read_bytes()
    for name in (
        ".hidden/1.png",
        "__MACOSX/1.png",
        "ant/._0.png",
        "ant/.ipynb_checkpoints/0.png",
        "ant/x.heic",
        "ant/x.gif",
        "ant/y.HEIC",
    ):
        path = image_folder / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
    (ants / "0.jfif").write_bytes(image)
    (ants / "0.png").rename(image_folder / "elsewhere.png")
    (ants / "loop").symlink_to(ants)
    (image_folder / "far").mkdir()
    (image_folder / "elsewhere.png").rename(image_folder / "far" / "0.png")
    (ants / "near").symlink_to(image_folder / "far")
    data = load_data(folder_settings(image_folder), CPU)
    assert (data.train.num_images + data.val.num_images, data.info.class_names) == (61, ["ant", "bee", "cat"])
    assert data.notes == ["left out: 2 .heic, 1 .gif"]
    files, complaints = datasets.find_images([image_folder / "train"])
    assert (len(files), complaints) == (61, data.notes)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "cat: Permission denied" in datasets.find_images([image_folder / "train"])[1][0]
    with pytest.raises(UserError, match="cat: Permission denied"):
        load_data(folder_settings(image_folder), CPU)


def test_names_of_any_bytes_and_of_either_unicode_form(image_folder):
    for part in ("train", "test"):
        (image_folder / part / "ant").rename(os.fsdecode(os.fsencode(image_folder / part) + b"/caf\xe9"))
        (image_folder / part / "bee").rename(image_folder / part / "Zo\u00eb")
        (image_folder / part / "Zoe\u0308").mkdir()
        (image_folder / part / "Zo\u00eb" / "1.png").rename(image_folder / part / "Zoe\u0308" / "1.png")
    data = load_data(folder_settings(image_folder, "--image-size", "80"), CPU)
    assert data.info.class_names == ["Zo\u00eb", "caf\\xe9", "cat"]
    assert data.train.num_images + data.val.num_images == 60
    assert (
        load_data(folder_settings(image_folder), CPU, stored=data.info, split=data.split).info.fingerprint
        == data.info.fingerprint
    )


def test_classes_that_are_numbers(image_folder):
    for part in ("train", "test"):
        for name, number in (("ant", "9"), ("bee", "10"), ("cat", "2")):
            (image_folder / part / name).rename(image_folder / part / number)
    data = load_data(folder_settings(image_folder), CPU)
    assert (data.info.class_names, data.sorted_by_name) == (["2", "9", "10"], True)
    old = dataclasses.replace(data.info, class_names=["10", "2", "9"])  # of a checkpoint from before
    anytime = folder_settings(image_folder, "--evalmode", "anytime")
    assert load_data(anytime, CPU, stored=old).info.class_names == old.class_names


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_keep_their_contrast(tmp_path, mode):
    ramp = np.arange(64, dtype=np.float64).reshape(8, 8)
    values = {
        "I;16": (1000 * ramp).astype(np.uint16),
        "I": (10**6 * ramp - 10**7).astype(np.int32),
        "F": (ramp / 63).astype(np.float32),
    }
    Image.fromarray(values[mode]).save(tmp_path / "deep.tif")
    pixels = read_image(tmp_path / "deep.tif", datasets.evaluation_transform(8))
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
    for transform in (datasets.evaluation_transform(64), TrainingTransform(64)):
        rows = read_image(tmp_path / f"photo.{suffix}", transform).float().mean(dim=0)
        assert rows.std(dim=1).max() < 2
        assert rows[-1].mean() > rows[0].mean() + 10


def test_photographs_of_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_PIXELS", 10**6)
    monkeypatch.setattr(datasets, "REDUCED_SIDE", 256)
    sizes = []
    for suffix in ("jpg", "png"):
        Image.new("RGB", (2000, 1500), (90, 120, 30)).save(tmp_path / f"large.{suffix}")
    read_image(tmp_path / "large.jpg", lambda image: sizes.append(datasets.rgb(image).size))
    assert sizes == [(500, 375)]
    with pytest.raises(UserError, match="decompression bomb"):
        read_image(tmp_path / "large.png")


def test_data_root(tmp_path, monkeypatch):
    """A folder that is not there is not made; ~ is the home; a complete archive needs no lock, and a download none where there is none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = parse("GE", ["--preset", "cifar10", "--data-root", "~/no/where"]).settings()
    assert settings.data_root == tmp_path / "no" / "where"
    calls = []

    def reader(root, train, download=False):
        calls.append(download)
        raise RuntimeError("Dataset not found or corrupted")

    def no_locks(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(datasets, "CIFAR10", reader)
    monkeypatch.setattr(datasets.fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="no cifar10 in --data-root"):
        load_data(settings, CPU)
    assert (calls, list(tmp_path.iterdir())) == ([False, True], [])


def test_workers_end_with_the_run(image_folder):
    """An exception between two batches, with its trace kept alive as Python's own hook does, ends the process."""
    flags = [
        "--data",
        "folder",
        "--data-root",
        str(image_folder),
        "--image-size",
        "80",
        "--val-size",
        "12",
        "--batch-size",
        "8",
    ]
    program = "import sys, torch; from args import parse; from dataloader import load_data\n"
    program += "data = load_data(parse('GE', sys.argv[1:]).settings(), torch.device('cpu'))\n"
    program += "for images, targets in data.train.epoch(0): raise BrokenPipeError"
    command = [sys.executable, "-c", program, *flags, "--workers", "1"]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent
    )
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("BrokenPipeError")
