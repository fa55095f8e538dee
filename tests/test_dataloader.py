"""Splits, augmentation, order, image folders, and what is refused."""

import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from args import parse
from dataloader import load_data
from image_data import archives, batches, reading
from image_data.batches import InMemoryBatches, Normalizer, Shard
from image_data.folders import find_images
from image_data.parts import Part
from image_data.reading import read_image
from image_data.split import choose_held_out, choose_test
from image_data.transforms import (
    CROP_PADDING,
    DrawsFrom,
    TrainingTransform,
    augmentation_policy,
    crop_and_flip,
    evaluation_transform,
)
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
    targets = torch.arange(100) % 5
    assert torch.equal(choose_held_out(targets, 10, 0), choose_held_out(targets, 10, 0))
    assert not torch.equal(choose_held_out(targets, 10, 0), choose_held_out(targets, 10, 1))
    default = parse("GE", ["--data", "folder"]).settings().val_size
    assert len(choose_held_out(torch.arange(120) % 5, default, 0)) == 12  # a tenth
    with pytest.raises(UserError, match="smaller --val-size"):
        choose_held_out(targets, 100, 0)


def test_split_of_the_published_settings_stays():
    """Finished runs and released results depend on it."""
    held_out = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))[:5000].sort().values
    assert torch.equal(choose_held_out(torch.arange(50_000) % 100, 5000, 0), held_out)


@pytest.mark.parametrize("seed", range(5))
def test_no_class_loses_all_its_training_images(seed):
    """Thirty classes of one image, ten of three: at most twenty images can be held out."""
    targets = torch.tensor([*range(30), *[label for label in range(30, 40) for _ in range(3)]])
    for size in (6, 20, 40):
        held_out = choose_held_out(targets, size, seed)
        assert len(held_out) == size
        trained = targets[~torch.isin(torch.arange(60), held_out)]
        assert size > 20 or len(trained.unique()) == 40


def test_test_images_are_an_equal_share_of_every_class():
    targets = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    assert torch.bincount(targets[choose_test(targets, 0.2, 0)]).tolist() == [10, 2, 1]
    assert torch.bincount(targets[choose_test(targets, 20, 0)])[:2].tolist() == [16, 3]
    assert not torch.equal(choose_test(targets, 0.2, 0), choose_test(targets, 0.2, 1))
    with pytest.raises(UserError, match="--test-size 63"):
        choose_test(targets, 63, 0)


def test_normalised_by_the_training_images(tiny_demo):
    data = load_data(parse("GE", ["--val-size", "10"]).settings(), CPU)
    images = torch.cat([images for images, _ in data.train])
    assert images.mean((0, 2, 3)).abs().max() < 1e-3
    assert (images.std((0, 2, 3)) - 1).abs().max() < 1e-2


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


def test_every_offset_and_flip_equally_likely(monkeypatch):
    seen, count = [], 40_000
    monkeypatch.setattr(
        batches, "crop_and_flip", lambda images, offsets, flips: seen.append((offsets, flips)) or images
    )
    images, targets = torch.zeros(count, 3, 1, 1, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)
    settings, normalize = (
        parse("GE", ["--batch-size", "1000", "--seed", "0"]).settings(),
        Normalizer([0.5] * 3, [0.5] * 3, CPU),
    )
    list(InMemoryBatches(Part(targets, images), settings, True, normalize, Shard()).epoch(0))
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
    """In memory (32 pixels) and decoded by two workers (80 pixels): a fresh loader that starts at step 2
    gives the rest, bit by bit."""
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
    policy, state = augmentation_policy(augment), torch.get_rng_state()
    for seed in range(60):
        with DrawsFrom(torch.Generator().manual_seed(seed)):
            ours = policy(image)
        assert torch.equal(torch.get_rng_state(), state)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            assert torch.equal(ours, policy(image))


def test_threads_leave_the_global_state_and_the_number_of_threads_alone(image_folder):
    settings = folder_settings(image_folder, "--image-size", "80", "--workers", "3", "--augment", "trivial")
    train, state = load_data(settings, CPU).train, torch.get_rng_state()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    list(train.epoch(0))
    assert torch.equal(torch.get_rng_state(), state)
    with ThreadPoolExecutor(1) as pool:
        assert [torch.get_num_threads(), pool.submit(torch.get_num_threads).result()] == [2, 2]
    torch.set_num_threads(before)


def test_what_cannot_be_loaded_is_named(image_folder):
    def refused(words, *flags, root=image_folder, shard=None):
        with pytest.raises(UserError, match=words):
            load_data(folder_settings(root, *flags), CPU, shard)

    refused("multiple", shard=Shard(0, 3))
    refused("--batch-size 64", "--batch-size", "64")
    refused("images in the folders ant, bee, cat.*--test-size", root=image_folder / "train")
    refused("there is no folder", root=image_folder / "nowhere")
    refused("train/CLASS", root=image_folder / "train" / "ant")
    (image_folder / "test").rename(image_folder / "elsewhere")
    refused("has train/ but no test images.*--test-size", root=image_folder)
    (image_folder / "train").rename(image_folder / "test")
    refused("has test/ but no training images", root=image_folder)
    (image_folder / "test").rename(image_folder / "train")
    (image_folder / "elsewhere").rename(image_folder / "test")
    for path in (image_folder / "train" / "bee").iterdir():
        path.unlink()
    refused("bee holds no image")


def damage(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("part", ["train", "test"])
def test_unreadable_small_image_is_named_or_skipped(image_folder, part):
    """At the start; with the flag every other image is there, and the split is that of all images."""
    whole = load_data(folder_settings(image_folder), CPU)
    damage(image_folder / part / "bee" / "3.png")
    with pytest.raises(UserError, match=r"bee/3\.png.*--skip-unreadable"):
        load_data(folder_settings(image_folder), CPU)
    data = load_data(folder_settings(image_folder, "--skip-unreadable"), CPU)
    assert sum(part.num_images for part in (data.train, data.val, data.test)) == 74
    assert torch.equal(data.split.held_out, whole.split.held_out)
    assert any("bee/3.png" in note for note in data.notes)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_large_image_is_named_when_it_is_met(image_folder, workers, capsys):
    """Or replaced in training by the next one of the order, alike on every process and after a resume, and
    left out of evaluation."""
    flags = ["--image-size", "80", "--workers", workers]
    for part in ("train", "test"):
        damage(image_folder / part / "bee" / "3.png")
    data = load_data(folder_settings(image_folder, *flags), CPU)
    for batches_of_part in (data.train.epoch(0), data.test):
        with pytest.raises(UserError, match=r"bee/3\.png.*--skip-unreadable"):
            list(batches_of_part)
    with pytest.raises(UserError, match=r"bee/3\.png.*--skip-unreadable"):
        load_data(folder_settings(image_folder, *flags, "--check-images"), CPU)

    settings = folder_settings(image_folder, *flags, "--skip-unreadable")
    data, *shares = (load_data(settings, CPU, shard) for shard in (None, Shard(0, 2), Shard(1, 2)))
    whole = [torch.cat(x) for x in zip(*data.train.epoch(0), strict=True)]
    assert len(whole[0]) == 48
    assert capsys.readouterr().err.count("train/bee/3.png") == 1
    rest = [torch.cat(x) for x in zip(*data.train.epoch(0, 2), strict=True)]
    assert all(torch.equal(a[16:], b) for a, b in zip(whole, rest, strict=True))
    steps = zip(*(share.train.epoch(0) for share in shares), strict=True)
    together = torch.cat([images for step in steps for images, _ in step])
    assert torch.equal(together, whole[0])
    for part in (data, *shares):
        count = len(part.test.own())
        labels = torch.cat([targets for _, targets in part.test])
        assert len(labels) == len(part.test.own()) in (count, count - 1)
    assert len(data.test.own()) == 14
    notes = load_data(folder_settings(image_folder, *flags, "--skip-unreadable", "--check-images"), CPU).notes
    assert "bee/3.png" in notes[-1]
    assert "others" in notes[-1]


def test_a_class_of_damaged_images_costs_no_more_than_itself(image_folder):
    """Whatever is left of an epoch's order serves; with nothing left, one line."""
    flags = ["--image-size", "80", "--workers", "2", "--skip-unreadable", "--val-size", "0"]
    for path in (image_folder / "train" / "ant").iterdir():
        damage(path)
    train = load_data(folder_settings(image_folder, *flags), CPU).train
    assert set(torch.cat([targets for _, targets in train.epoch(0)]).tolist()) == {1, 2}
    for path in (image_folder / "train").glob("*/*.png"):
        damage(path)
    with pytest.raises(UserError, match="none of the training images"):
        list(train.epoch(0))


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
    assert any("the test images are those of" in note and "val" in note for note in data.notes)
    (image_folder / "test" / "all").rename(image_folder / "test" / "ant")
    with pytest.raises(UserError, match="test lacks bee, cat"):
        load_data(folder_settings(image_folder), CPU)
    assert load_data(folder_settings(image_folder, "--data", "imagenet"), CPU).test.num_images == 14


def test_only_visible_images_are_read_and_others_counted(image_folder, monkeypatch):
    """Alike in training and prediction: links are followed, each real folder once, and a closed folder is
    named."""
    ants = image_folder / "train" / "ant"
    image = (ants / "0.png").read_bytes()
    for name in (
        ".hidden/1.png",
        "__MACOSX/1.png",
        "@eaDir/1.png",
        "#Recycle/1.png",
        "$RECYCLE.BIN/1.png",
        "System Volume Information/1.png",
        "ant/@eaDir/0.png/SYNOFILE_THUMB_M.png",
        "ant/Thumbs.db",
        "ant/._0.png",
        "ant/.ipynb_checkpoints/0.png",
        "ant/x.heic",
        "ant/x.gif",
        "ant/y.HEIC",
    ):
        path = image_folder / "train" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(image)
    (ants / "0.jfif").write_bytes(image)
    (ants / "0.png").rename(image_folder / "elsewhere.png")
    (ants / "loop").symlink_to(ants)
    (image_folder / "far").mkdir()
    (image_folder / "elsewhere.png").rename(image_folder / "far" / "0.png")
    (ants / "near").symlink_to(image_folder / "far")
    data = load_data(folder_settings(image_folder), CPU)
    assert (data.train.num_images + data.val.num_images, data.info.class_names) == (61, ["ant", "bee", "cat"])
    assert data.notes[0] == "left out: 2 .heic, 1 .gif"
    files, complaints = find_images([image_folder / "train"])
    assert (len(files), complaints) == (61, data.notes[:1])
    real = os.scandir

    def scandir(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "cat: Permission denied" in find_images([image_folder / "train"])[1][0]
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
    pixels = read_image(tmp_path / "deep.tif", evaluation_transform(8))
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
    for transform in (evaluation_transform(64), TrainingTransform(64)):
        rows = read_image(tmp_path / f"photo.{suffix}", transform).float().mean(dim=0)
        assert rows.std(dim=1).max() < 2
        assert rows[-1].mean() > rows[0].mean() + 10


def test_photographs_of_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_PIXELS", 10**6)
    monkeypatch.setattr(reading, "REDUCED_SIDE", 256)
    sizes = []
    for suffix in ("jpg", "png"):
        Image.new("RGB", (2000, 1500), (90, 120, 30)).save(tmp_path / f"large.{suffix}")
    read_image(tmp_path / "large.jpg", lambda image: sizes.append(reading.rgb(image).size))
    assert sizes == [(500, 375)]
    with pytest.raises(UserError, match="decompression bomb"):
        read_image(tmp_path / "large.png")


def test_data_root(tmp_path, monkeypatch):
    """A folder that is not there is not made; ~ is the home; a complete archive needs no lock, and a download
    none where there is none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = parse("GE", ["--preset", "cifar10", "--data-root", "~/no/where"]).settings()
    assert settings.data_root == tmp_path / "no" / "where"
    calls = []

    def reader(root, train, download=False):
        calls.append(download)
        raise RuntimeError("Dataset not found or corrupted")

    def no_locks(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setitem(archives.READERS, "cifar10", reader)
    monkeypatch.setattr(archives.fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="no cifar10 in --data-root"):
        load_data(settings, CPU)
    assert (calls, list(tmp_path.iterdir())) == ([False, True], [])


def test_threads_end_with_the_run(image_folder):
    """An exception between two batches, with its trace kept alive as Python's own hook does, ends the
    process."""
    flags = [*FOLDER, "--data-root", str(image_folder), "--image-size", "80", "--workers", "1"]
    program = "import sys, torch; from args import parse; from dataloader import load_data\n"
    program += "data = load_data(parse('GE', sys.argv[1:]).settings(), torch.device('cpu'))\n"
    program += "for images, targets in data.train.epoch(0): raise BrokenPipeError"
    command, root = [sys.executable, "-c", program, *flags], Path(__file__).parent.parent
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("BrokenPipeError")


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
    for transform in (evaluation_transform(100), TrainingTransform(100)):
        found = read_image(tmp_path / "image.png", transform)
        assert found.max() == 255
        assert torch.equal(found[0] == 255, found[2] == 255)
    assert read_image(tmp_path / "image.png").getpixel((5, 5)) == (255, 255, 255)


def test_a_single_class_is_refused(image_folder):
    """As a folder too many gives it; what is in it is named."""
    for part in ("train", "test"):
        (image_folder / part).rename(image_folder / "images")
        (image_folder / part).mkdir()
        (image_folder / "images").rename(image_folder / part / "images")
    with pytest.raises(
        UserError, match=r"two classes.*train holds one, images, with 60 images in the folders ant, bee, cat"
    ):
        load_data(folder_settings(image_folder), CPU)


def test_start_tells_classes_and_sizes(image_folder):
    notes = load_data(folder_settings(image_folder, "--image-size", "80"), CPU).notes
    assert "3 classes (ant, bee, cat), images of 80 x 80 pixels" in notes
    assert any("32 pixels a side in the median, enlarged to 80" in note for note in notes)
    assert not any("enlarged" in note for note in load_data(folder_settings(image_folder), CPU).notes)


@pytest.mark.parametrize("size", ["32", "80"])
def test_test_images_are_split_off_and_stay_so(image_folder, size):
    """Of train/CLASS/ or CLASS/; a resumed or evaluated run has the same parts, also after images came and
    went."""
    with pytest.raises(UserError, match="test holds test images: --test-size"):
        load_data(folder_settings(image_folder, "--test-size", "20%"), CPU)
    root = image_folder / "train"
    settings = folder_settings(root, "--test-size", "20%", "--image-size", size, "--workers", "0")

    def contents(data):
        images = (torch.cat([images for images, _ in part]) for part in (data.train, data.val, data.test))
        return [{image.numpy().tobytes() for image in part} for part in images]

    before = load_data(settings, CPU)
    assert [part.num_images for part in (before.train, before.val, before.test)] == [36, 12, 12]
    assert torch.bincount(torch.cat([targets for _, targets in before.test])).tolist() == [4, 4, 4]
    remembered = {"stored": before.info, "split": before.split}
    then = contents(before)
    assert contents(load_data(settings, CPU, **remembered)) == then
    (root / "ant" / "0.png").unlink()
    (root / "cat" / "5.png").rename(root / "cat" / "99.png")
    now = contents(load_data(settings, CPU, **remembered))
    assert now[0] <= then[0]
    assert now[1] <= then[1]
    assert len(now[0] | now[1] | now[2]) == 59


def test_other_classes_than_the_checkpoints_are_listed(image_folder):
    data = load_data(folder_settings(image_folder), CPU)
    for part in ("train", "test"):
        (image_folder / part / "bee").rename(image_folder / part / "wasp")
    with pytest.raises(
        UserError,
        match=r"3 classes \(ant, bee, cat\), the data have 3 \(ant, cat, wasp\); only .* bee; .* wasp",
    ):
        load_data(folder_settings(image_folder), CPU, stored=data.info, split=data.split)
