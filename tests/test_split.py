"""Which images are trained on, held out and tested on."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dataloader import load_data
from engine.checkpoint import LoadedNetwork
from engine.run_data import data_for_new_run, load_run_data
from engine.runtime.distributed import Processes
from image_data import data_sets
from image_data.split import Role, choose_held_out, choose_test, roles_in
from image_data.subsets import Subset, pixel_digests
from models.description import Split
from settings.command_line import parse
from tests.conftest import CPU, folder_settings
from utils import UserError


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


def test_classes_that_have_no_training_image_are_named(image_folder):
    """As all of them are held out, or cannot be read."""

    def lines(*flags):
        notes = load_data(folder_settings(image_folder, "--batch-size", "2", *flags), CPU).notes
        return [note for note in notes if note.startswith("no training image")]

    assert lines("--val-size", "57") == []  # one image of every class stays
    (line,) = lines("--val-size", "58")
    assert line.rsplit(" ", 1)[0] == "no training image is left of 1 of 3 classes:"
    for path in (image_folder / "train" / "bee").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    assert lines("--skip-unreadable") == ["no training image is left of 1 of 3 classes: bee"]


def test_test_images_are_an_equal_share_of_every_class():
    targets = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    assert torch.bincount(targets[choose_test(targets, 0.2, 0)]).tolist() == [10, 2, 1]
    assert torch.bincount(targets[choose_test(targets, 20, 0)])[:2].tolist() == [16, 3]
    assert not torch.equal(choose_test(targets, 0.2, 0), choose_test(targets, 0.2, 1))
    with pytest.raises(UserError, match="--test-size 63"):
        choose_test(targets, 63, 0)


def test_roles_of_images_in_the_training_of_another_network():
    names = torch.arange(6) * 11
    origin = Split(held_out=torch.tensor([1, 4]), name_digests=names[:5])
    expected = [Role.TRAINED, Role.HELD_OUT, Role.TRAINED, Role.TRAINED, Role.HELD_OUT, Role.UNKNOWN]
    assert roles_in(origin, names).tolist() == expected


def test_images_held_out_from_the_network_to_start_from_stay_so_with_a_share_of_new_ones():
    """Thirty images of a third class came to two classes of a hundred."""
    targets = torch.tensor([0] * 100 + [1] * 100 + [2] * 30)
    roles = torch.where(targets == 2, int(Role.UNKNOWN), int(Role.TRAINED))
    roles[90:110] = Role.HELD_OUT
    held_out = choose_held_out(targets, 23, 0, roles)
    assert torch.bincount(roles[held_out], minlength=3).tolist() == [3, 20, 0]
    held_out = choose_held_out(targets, 40, 0, roles)  # the others are new while there are any
    assert torch.bincount(roles[held_out], minlength=3).tolist() == [20, 20, 0]
    # Half of 41 were not held out: as without that network.
    assert torch.equal(choose_held_out(targets, 41, 0, roles), choose_held_out(targets, 41, 0))


def test_test_images_are_unknown_to_the_network_to_start_from_where_possible():
    targets = torch.tensor([0] * 50 + [1] * 50)
    first, second = [Role.UNKNOWN] * 8 + [Role.HELD_OUT] * 4, [Role.UNKNOWN] * 12
    roles = torch.tensor([*first, *[Role.TRAINED] * 38, *second, *[Role.TRAINED] * 38])
    is_test = choose_test(targets, 0.2, 0, roles)
    chosen = [torch.bincount(roles[is_test & (targets == label)]).tolist() for label in (0, 1)]
    assert chosen == [[8, 2], [10]]


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
    shutil.copy(image_folder / "test" / "ant" / "0.png", root / "ant" / "new.png")
    now = contents(load_data(settings, CPU, **remembered))
    assert all(after <= before for after, before in zip(now, then, strict=True))
    assert len(now[0] | now[1] | now[2]) == 58
    older = before.split._replace(test_digests=before.split.test_digests[:0])
    assert len(contents(load_data(settings, CPU, stored=before.info, split=older))[2]) >= 12


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
    no_digests = before.split.name_digests[:0]
    with pytest.raises(UserError, match="not those of the checkpoint"):
        load_data(settings, CPU, **{**remembered, "split": before.split._replace(name_digests=no_digests)})
    for i in range(6, 12):
        (ants / f"{i}.png").unlink()
    with pytest.raises(UserError, match="not those of the checkpoint"):
        load_data(settings, CPU, **remembered)


def test_the_same_images_are_held_out_in_another_copy_of_cifar(tmp_path, monkeypatch):
    """With its images in another order, of which two are equal."""
    images = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8)
    images[7] = images[3]
    targets, flags = torch.arange(200) % 10, ["--data", "cifar10", "--data-root", str(tmp_path)]
    names = [f"class {i}" for i in range(10)]

    def data_of(order, **remembered):
        train = Subset(targets[order], images[order])
        monkeypatch.setattr(data_sets, "read_cifar", lambda *_: (train, train, names))
        return load_data(parse("GE", [*flags, "--val-size", "40"]).settings(), CPU, **remembered)

    before = data_of(torch.arange(200))
    split = before.split._replace(pixel_digests=pixel_digests(before.val.images))
    assert Split.from_tensors(split.to_tensors()).pixel_digests.tolist() == split.pixel_digests.tolist()
    order = torch.randperm(200)
    after = data_of(order, stored=before.info, split=split)
    for part in ("train", "val"):
        pixels = [sorted(x.numpy().tobytes() for x in getattr(d, part).images) for d in (before, after)]
        assert pixels[0] == pixels[1]
    with pytest.raises(UserError, match="not those of the checkpoint"):
        data_of(order, stored=before.info, split=before.split)
    # Fine-tuning, which may take other images, takes the split too.
    lines = []
    session = SimpleNamespace(
        settings=parse("GE", [*flags, "--val-size", "30"]).settings(),
        processes=Processes(0, 1, CPU, ()),
        log=SimpleNamespace(line=lines.append),
    )
    origin = LoadedNetwork(Path("origin"), None, SimpleNamespace(data=before.info), split)
    tuned = data_for_new_run(session, origin, None, may_change=True)
    assert (tuned.val.num_images, tuned.info) == (40, before.info)
    assert "the same 40 of them are held out" in lines[1]
    images[before.split.held_out[0]] += 1
    with pytest.raises(UserError, match="not those of the checkpoint"):
        data_of(order, stored=before.info, split=split)


def test_processes_that_find_other_images_are_refused():
    """As on two machines of which one lacks a file: each would hold out other images."""
    session = SimpleNamespace(
        settings=parse("GE", ["--val-size", "10"]).settings(),
        processes=Processes(0, 1, CPU, ()),
        log=SimpleNamespace(line=lambda text: None),
    )
    assert load_run_data(session).val.num_images == 10
    session.processes = SimpleNamespace(
        device=CPU,
        shard=None,
        world_size=2,
        all_equal=lambda number: False,
    )
    with pytest.raises(UserError, match="find different images: --data-root must hold the same ones"):
        load_run_data(session)


def test_held_out_images_are_neither_trained_on_nor_augmented(image_folder):
    data = load_data(folder_settings(image_folder), CPU)
    assert (data.train.num_images, data.val.num_images, data.test.num_images) == (48, 12, 15)
    trained = {image.numpy().tobytes() for image in data.train.images}
    held_out = {image.numpy().tobytes() for image in data.val.images}
    assert len(held_out) == 12
    assert not trained & held_out
    assert [part.augment for part in (data.train, data.val, data.test)] == ["standard", "none", "none"]
