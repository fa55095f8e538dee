"""Data sets in folders and archives, and what is refused."""

import dataclasses
import os
import shutil
import sys

import pytest
import torch
from PIL import Image

from dataloader import load_data
from image_data import archives
from image_data.folders import find_images
from image_data.subsets import Shard
from settings.command_line import parse
from tests.conftest import CPU, folder_settings
from utils import UserError


def test_normalised_by_the_training_images(tiny_demo):
    data = load_data(parse("GE", ["--val-size", "10"]).settings(), CPU)
    images = torch.cat([images for images, _ in data.train])
    assert images.mean((0, 2, 3)).abs().max() < 1e-3
    assert (images.std((0, 2, 3)) - 1).abs().max() < 1e-2


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
    (image_folder / "val").mkdir()
    shutil.copy(image_folder / "train" / "ant" / "0.png", image_folder / "val")
    refused("val has images, but no classes: sort them into val/CLASS/", root=image_folder)
    shutil.rmtree(image_folder / "val")
    (image_folder / "train").rename(image_folder / "test")
    refused("has test/ but no training images", root=image_folder)
    (image_folder / "test").rename(image_folder / "train")
    (image_folder / "elsewhere").rename(image_folder / "test")
    for path in (image_folder / "train" / "bee").iterdir():
        path.unlink()
    refused("bee holds no image")


def test_folders_of_other_names_or_one_too_many_are_named(image_folder):
    """Also with --test-size, which would make classes of them."""
    outer = image_folder.rename(image_folder.with_name("inner")).parent
    for flags in ([], ["--test-size", "20%"]):
        with pytest.raises(UserError, match=r"but .*inner has: use --data-root .*inner$"):
            load_data(folder_settings(outer, *flags), CPU)
    root = outer / "inner"
    for name in ("train", "test"):
        (root / name).rename(root / f"{name.title()}ing")
    for flags in ([], ["--test-size", "20%"]):
        with pytest.raises(UserError, match="has the folders Testing, Training, but no train/ and no test/"):
            load_data(folder_settings(root, *flags), CPU)


def test_a_class_may_be_named_train(image_folder):
    """Trains among other vehicles; with a folder of test images the names train and test are taken."""
    root = image_folder / "train"
    (root / "bee").rename(root / "train")
    data = load_data(folder_settings(root, "--test-size", "20%"), CPU)
    assert (data.info.class_names, data.test.num_images) == (["ant", "cat", "train"], 12)
    with pytest.raises(UserError, match=r"in the folders ant, cat, train.*--test-size"):
        load_data(folder_settings(root), CPU)


def test_a_pipe_among_the_images_is_not_waited_for(image_folder):
    for size in ("32", "80"):
        path = image_folder / "train" / "ant" / "pipe.png"
        os.mkfifo(path)
        flags = ["--image-size", size, "--check-images"]
        with pytest.raises(UserError, match=r"pipe\.png: it is not a file"):
            load_data(folder_settings(image_folder, *flags), CPU)
        data = load_data(folder_settings(image_folder, *flags, "--skip-unreadable"), CPU)
        assert any("skipped: cannot read the image" in note for note in data.notes)
        path.unlink()


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
        "ant/#snapshot/0.png",
        "ant/found.000/0.png",
        "Temporary Items/1.png",
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


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses or changes such names")
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
    assert data.info.class_names == ["2", "9", "10"]
    old = dataclasses.replace(data.info, class_names=["10", "2", "9"])  # of a checkpoint from before
    anytime = folder_settings(image_folder, "--evalmode", "anytime")
    assert load_data(anytime, CPU, stored=old).info.class_names == old.class_names


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


def test_test_images_are_not_split_off_an_archive(tmp_path):
    flags = ["--preset", "cifar100", "--data-root", str(tmp_path), "--test-size", "20%"]
    with pytest.raises(UserError, match="--test-size is for folders of images: cifar100 comes with test"):
        load_data(parse("GE", flags).settings(), CPU)


def test_own_images_are_not_taken_for_cifar(image_folder):
    """They may lie in ``data/``, where the archive is looked for."""
    for path in image_folder.glob("test/*/*.png"):
        Image.new("RGB", (300, 200)).save(path)
    settings = parse("GE", ["--data", "cifar10", "--data-root", str(image_folder), "--val-size", "6"])
    with pytest.raises(
        UserError, match="not those of cifar10, as most have 200 pixels a side: --data folder"
    ):
        load_data(settings.settings(), CPU)


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
    assert "classes: ant, bee, cat" in notes
    assert any("32 pixels a side in the median, enlarged to 80" in note for note in notes)
    assert not any("enlarged" in note for note in load_data(folder_settings(image_folder), CPU).notes)


def test_other_classes_than_the_checkpoints_are_listed(image_folder):
    data = load_data(folder_settings(image_folder), CPU)
    for part in ("train", "test"):
        (image_folder / part / "bee").rename(image_folder / part / "wasp")
    with pytest.raises(
        UserError,
        match=r"3 classes \(ant, bee, cat\), the data have 3 \(ant, cat, wasp\); only .* bee; .* wasp",
    ):
        load_data(folder_settings(image_folder), CPU, stored=data.info, split=data.split)
