"""Order, augmentation, threads and unreadable images."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dataloader import load_data
from image_data import batches
from image_data.batches import InMemoryBatches
from image_data.subsets import Shard, Subset
from image_data.transforms import CROP_PADDING
from models.normalizer import Normalizer
from settings.command_line import parse
from tests.conftest import CPU, FOLDER, folder_settings
from utils import UserError


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
    list(InMemoryBatches(Subset(targets, images), settings, True, normalize, Shard()).epoch(0))
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
    assert (none.num_images, len(none.local_indices())) == (0, 0)


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


def test_threads_leave_the_global_state_and_the_number_of_threads_alone(image_folder):
    settings = folder_settings(image_folder, "--image-size", "80", "--workers", "3", "--augment", "trivial")
    train, state = load_data(settings, CPU).train, torch.get_rng_state()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        list(train.epoch(0))
        assert torch.equal(torch.get_rng_state(), state)
        with ThreadPoolExecutor(1) as pool:
            assert [torch.get_num_threads(), pool.submit(torch.get_num_threads).result()] == [2, 2]
    finally:
        torch.set_num_threads(before)


def test_an_evaluation_takes_as_many_images_as_a_device_does_in_training(image_folder):
    flags = ["--batch-size", "32", "--accumulate", "2"]
    assert load_data(folder_settings(image_folder, *flags), CPU).test.evaluation_batch_size == 16
    data_parallel = folder_settings(image_folder, *flags, "--gpu", "0,1")
    assert load_data(data_parallel, CPU).test.evaluation_batch_size == 8


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


@pytest.mark.parametrize("flags", [[], ["--image-size", "80", "--check-images"]], ids=["small", "large"])
def test_all_unreadable_images_are_named_at_once(image_folder, flags):
    names = ["train/ant/1.png", "train/bee/3.png", "test/bee/3.png"]
    for name in names:
        damage(image_folder / name)
    with pytest.raises(UserError) as error:
        load_data(folder_settings(image_folder, *flags), CPU)
    assert [name for name in names if name in str(error.value)] == names
    notes = load_data(folder_settings(image_folder, *flags, "--skip-unreadable"), CPU).notes
    assert [name for name in names if name in notes[-1]] == names


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
    with pytest.raises(UserError, match=r"train/bee/3\.png.*test/bee/3\.png.*--skip-unreadable"):
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
        count = len(part.test.local_indices())
        labels = torch.cat([targets for _, targets in part.test])
        assert len(labels) == len(part.test.local_indices()) in (count, count - 1)
    assert len(data.test.local_indices()) == 14
    notes = load_data(folder_settings(image_folder, *flags, "--skip-unreadable", "--check-images"), CPU).notes
    assert "train/bee/3.png" in notes[-1]
    assert "test/bee/3.png" in notes[-1]


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


def test_no_training_begins_without_a_test_image_that_can_be_read(image_folder):
    for path in (image_folder / "test").glob("*/*.png"):
        damage(path)
    with pytest.raises(UserError, match=r"none of the test images can be read: .*ant/0\.png"):
        load_data(folder_settings(image_folder, "--skip-unreadable"), CPU)


def test_every_process_names_what_it_skips(image_folder, capsys):
    damage(image_folder / "test" / "ant" / "1.png")
    settings = folder_settings(image_folder, "--image-size", "80", "--check-images", "--skip-unreadable")
    notes = [load_data(settings, CPU, Shard(rank, 2)).notes for rank in range(2)]
    assert not any("ant/1.png" in note for note in notes[0])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("skipped: ")
    assert "ant/1.png" in line


@pytest.mark.parametrize("size", ["32", "80"])
def test_an_evaluation_takes_as_many_images_at_once_as_a_training_step(image_folder, size):
    settings = folder_settings(image_folder, "--image-size", size, "--accumulate", "2")
    for rank in range(2):
        test = load_data(settings, CPU, Shard(rank, 2)).test
        counts = [len(targets) for _, targets in test]
        assert max(counts) == 8 // 2 // 2
        assert sum(counts) == len(test.local_indices())


@pytest.mark.parametrize(
    ("workers", "cores", "threads"), [(None, 1, 1), (None, 16, 4), (9, 1, 9), (0, 16, 0)]
)
def test_threads_are_as_many_as_cores_by_default(image_folder, monkeypatch, workers, cores, threads):
    monkeypatch.setattr("image_data.defaults.available_cores", lambda: cores)
    flags = [] if workers is None else ["--workers", str(workers)]
    data = load_data(folder_settings(image_folder, "--image-size", "80", *flags), CPU)
    assert data.train.workers == threads


def test_threads_end_with_the_run(image_folder):
    """An exception between two batches, with its trace kept alive as Python's own hook does, ends the
    process."""
    flags = [*FOLDER, "--data-root", str(image_folder), "--image-size", "80", "--workers", "1"]
    program = "import sys, torch; from settings.command_line import parse; from dataloader import load_data\n"
    program += "data = load_data(parse('GE', sys.argv[1:]).settings(), torch.device('cpu'))\n"
    program += "for images, targets in data.train.epoch(0): raise BrokenPipeError"
    command, root = [sys.executable, "-c", program, *flags], Path(__file__).parent.parent
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("BrokenPipeError")
