"""The three subsets of a data set, as batches of normalised float tensors on the training device.

Example:
    data = load_data(settings, device)
    for images, targets in data.train.epoch(0): ...   # (N, 3, H, W), (N,)
    for images, targets in data.test: ...
"""

from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from image_data.batches import UNREADABLE_HINT, Batches, FileBatches, InMemoryBatches
from image_data.data_sets import find_data_set
from image_data.defaults import (
    IMAGE_SIZES,
    NORMALIZATION,
    SMALL_IMAGE_SIZE,
    default_crop_share,
    num_workers,
)
from image_data.reading import median_side, read_image
from image_data.split import (
    HELD_OUT_SHARE,
    choose_held_out,
    match_training_images,
    roles_in,
)
from image_data.subsets import DataSet, Shard, Subset, name_digests
from image_data.threads import map_batches
from image_data.transforms import TrainingTransform, Transform, evaluation_transform
from models.description import DataInfo, ImageSpec, Split
from models.normalizer import Normalizer
from utils import UserError, listed, one_line, print_error

SUBSETS = ("train", "val", "test")
TEST_ALONE = ("anytime", "runtime")  # evaluations that need no other images
FILES_AT_ONCE = 256  # that threads read ahead


@dataclass(frozen=True)
class Data:
    """The three subsets of a data set.

    Attributes:
        info: Names, preprocessing and training images, for checkpoints.
        split: Which training images are ``val``.
        notes: Lines for the user.
        train: The images to train on.
        val: The held-out training images.
        test: The test images.
    """

    info: DataInfo
    split: Split
    notes: list[str]
    train: Batches
    val: Batches
    test: Batches


def load_data(
    settings: Namespace,
    device: torch.device,
    shard: Shard | None = None,
    stored: DataInfo | None = None,
    split: Split | None = None,
    image_spec: ImageSpec | None = None,
    origin_split: Split | None = None,
) -> Data:
    """Find, check and split the data set that ``settings`` name.

    Images of at most ``SMALL_IMAGE_SIZE`` pixels are read now, larger ones when they are needed. Anytime
    and runtime evaluation need no training images.

    Args:
        settings: Settings with data, data_root, image_size, val_size, test_size, split_seed, seed, evalmode,
            check_images, channels_last, and those that ``Batches`` take.
        device: Device of the batches.
        shard: This process's share of every batch. If None, all of it.
        stored: The data set of a checkpoint, which must have the same classes.
        split: The split of the checkpoint, which is taken over; training images that it does not know are
            left out. None chooses a new one.
        image_spec: The images that the network to train expects; by default those of ``stored``, or else of
            the settings.
        origin_split: Split of the network to start from. A new split holds out the same images, and others
            that did not train that network, where possible.

    Raises:
        UserError: Missing or empty folders, unreadable images, classes that differ between the subsets, an
            impossible split, other data than the checkpoint's.
    """
    spec = image_spec or (stored.image_spec if stored else None)
    image_size = settings.image_size or (spec.image_size if spec else IMAGE_SIZES[settings.data])
    crop_share = spec.crop_share if spec else default_crop_share(image_size)
    interpolation = spec.interpolation if spec else "bilinear"
    has_normalization = spec is not None or settings.data in NORMALIZATION
    data_set, subsets, split = _find_and_split(
        settings, image_size, stored, split, has_normalization, origin_split
    )
    notes = [*data_set.notes, *_notes(data_set, subsets["train"], image_size)]
    evaluation = evaluation_transform(image_size, crop_share, interpolation)
    if image_size <= SMALL_IMAGE_SIZE:
        # An evaluation reads training images only to normalise by them.
        skips_training_images = settings.evalmode is not None and has_normalization
        names = SUBSETS[1:] if skips_training_images else SUBSETS
        in_memory, skipped = _read_small_images(
            {name: subsets[name] for name in names}, image_size, evaluation, settings
        )
        subsets |= in_memory
        notes += skipped
    if settings.evalmode is None:
        _refuse_large_batch(settings.batch_size, len(subsets["train"]))
        notes += _lost_classes(subsets["train"], data_set.class_names)
    mean, std = (spec.mean, spec.std) if spec else _normalization(settings.data, subsets["train"])
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    normalize = Normalizer(mean, std, device, layout)
    transforms = (evaluation, TrainingTransform(image_size, settings.augment, interpolation))
    shared = {"settings": settings, "normalize": normalize, "shard": shard or Shard()}
    batches: dict[str, Batches] = {}
    for name, subset in subsets.items():
        if subset.images is not None:
            batches[name] = InMemoryBatches(subset, augment=name == "train", **shared)
        else:
            batches[name] = FileBatches(subset, transforms, augment=name == "train", **shared)
    if settings.check_images:
        found = _check(batches.values(), settings.skip_unreadable)
        if shard is None or shard.rank == 0:
            notes += found
        elif found:  # of its own share; only the main process prints notes
            print_error(found[0])
    # A stored split refers to the training images of its own data set.
    is_stored = stored is not None and stored.knows_training_images
    info = DataInfo(
        name=settings.data,
        class_names=data_set.class_names,
        image_size=image_size,
        crop_share=crop_share,
        interpolation=interpolation,
        mean=list(mean),
        std=list(std),
        num_training_images=stored.num_training_images if is_stored else len(data_set.train),
        fingerprint=stored.fingerprint if is_stored else data_set.fingerprint,
    )
    return Data(info, split, [one_line(note) for note in notes], **batches)


def _find_and_split(
    settings: Namespace,
    image_size: int,
    stored: DataInfo | None,
    split: Split | None,
    has_normalization: bool,
    origin_split: Split | None,
) -> tuple[DataSet, dict[str, Subset], Split]:
    """Find the data set; return it, its subsets by the names in ``SUBSETS``, and its split."""
    test_alone = settings.evalmode in TEST_ALONE
    needs_no_mean = has_normalization or image_size > SMALL_IMAGE_SIZE
    only_test = test_alone and needs_no_mean and settings.test_size is None
    data_set = find_data_set(settings, image_size, stored, split, only_test, origin_split)
    _refuse_other_size(data_set)
    numbers = match_training_images(data_set, stored, split)
    if split is None:
        held_out = _hold_out(data_set, settings, 0 if test_alone else settings.val_size, origin_split)
        split = Split(held_out, data_set.digests, name_digests(data_set.test_names))
    is_held_out = torch.isin(numbers, split.held_out)
    subsets = {
        "train": data_set.train.take((~is_held_out & (numbers >= 0)).nonzero().flatten()),
        "val": data_set.train.take((is_held_out & (not test_alone)).nonzero().flatten()),
        "test": data_set.test,
    }
    return data_set, subsets, split


def _refuse_other_size(data_set: DataSet) -> None:
    """Raise ``UserError`` if folders of CIFAR hold other images, such as the user's own in ``data/``."""
    if data_set.name not in ("cifar10", "cifar100") or data_set.test.files is None:
        return
    side = median_side(data_set.test.files)
    if side not in (None, IMAGE_SIZES[data_set.name]):
        raise UserError(
            f"the images are not those of {data_set.name}, as most have {side} pixels a side: "
            "--data folder is for your own images, and --data-root names another folder"
        )


def _refuse_large_batch(batch_size: int, count: int) -> None:
    if count < batch_size:
        raise UserError(
            f"--batch-size {batch_size} is more than the {count} training images without the held-out ones; "
            f"give --batch-size {count} or less"
        )


def _hold_out(data_set: DataSet, settings: Namespace, size: int | None, origin_split: Split | None) -> Tensor:
    """Choose the held-out images, and add a note where nobody said how many."""
    digests = data_set.digests
    roles = roles_in(origin_split, digests) if origin_split and len(digests) else None
    held_out = choose_held_out(data_set.train.targets, size, settings.split_seed, roles)
    if size is None:
        data_set.notes.append(
            f"{HELD_OUT_SHARE} % of the training images are held out to choose the best "
            "epoch and the thresholds; --val-size N changes that"
        )
    return held_out


def _lost_classes(training_subset: Subset, class_names: list[str]) -> list[str]:
    """Return a line about classes whose images are all held out, gone or unreadable."""
    counts = torch.bincount(training_subset.targets, minlength=len(class_names))
    lost = [name for name, count in zip(class_names, counts.tolist(), strict=True) if count == 0]
    if not lost:
        return []
    return [f"no training image is left of {len(lost)} of {len(class_names)} classes: {listed(lost)}"]


def _notes(data_set: DataSet, training_subset: Subset, image_size: int) -> list[str]:
    """Return a line with the classes, and one about files that would be enlarged a lot."""
    notes = [f"classes: {listed(data_set.class_names)}"]
    files = training_subset.files or data_set.test.files or []
    side = median_side(files)
    if side is not None and side * 2 <= image_size:
        notes.append(
            f"the images are small: {side} pixels a side in the median, "
            f"enlarged to {image_size}; a smaller --image-size costs less"
        )
    return notes


def _read_small_images(
    subsets: dict[str, Subset], image_size: int, evaluation: Transform, settings: Namespace
) -> tuple[dict[str, Subset], list[str]]:
    """Return the subsets with their images in memory, and the notes of ``_skipped`` about all of them."""
    workers = num_workers(settings.workers)
    read = {name: _in_memory(subset, image_size, evaluation, workers) for name, subset in subsets.items()}
    unreadable = list(chain.from_iterable(errors for _, errors in read.values()))
    skipped = _skipped(unreadable, settings.skip_unreadable)
    return {name: _not_emptied(name, *result) for name, result in read.items()}, skipped


def _in_memory(
    subset: Subset, image_size: int, evaluation: Transform, workers: int
) -> tuple[Subset, list[str]]:
    """Read small images as bytes; return those that can be read, and a line about each of the others."""
    if subset.files is None:
        return subset, []

    def attempt(path: Path) -> np.ndarray | UserError:
        try:
            return read_image(path, evaluation).numpy()
        except UserError as error:
            return error

    batches = (subset.files[i : i + FILES_AT_ONCE] for i in range(0, len(subset), FILES_AT_ONCE))
    images = np.empty((len(subset), 3, image_size, image_size), np.uint8)
    readable, errors = [], []
    for i, result in enumerate(chain.from_iterable(map_batches(attempt, batches, workers))):
        if isinstance(result, UserError):
            errors.append(str(result))
        else:
            images[len(readable)] = result
            readable.append(i)
    return Subset(subset.targets[readable], torch.from_numpy(images[: len(readable)])), errors


def _not_emptied(name: str, subset: Subset, errors: list[str]) -> Subset:
    """Return a subset, or raise an error if none of its images could be read."""
    if errors and len(subset) == 0:
        title = {"train": "training", "val": "held-out", "test": "test"}[name]
        raise UserError(f"none of the {title} images can be read: {errors[0]}")
    return subset


def _check(all_batches: Iterable[Batches], skip: bool) -> list[str]:
    """Read all images that are decoded when they are needed, and return what ``_skipped`` does."""
    file_batches = [batches for batches in all_batches if isinstance(batches, FileBatches)]
    return _skipped([line for batches in file_batches for line in batches.check()], skip)


def _skipped(errors: list[str], skip: bool) -> list[str]:
    """Raise an error that names unreadable images, or return a note about them if they are to be skipped."""
    if not errors:
        return []
    summary = listed(errors)
    if not skip:
        raise UserError(f"{summary}; {UNREADABLE_HINT}")
    return [f"skipped: {summary}"]


def _normalization(name: str, training_subset: Subset) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation of the channels: published, or of the small training images."""
    if name in NORMALIZATION or training_subset.images is None:
        return NORMALIZATION.get(name, NORMALIZATION["imagenet"])
    if len(training_subset) == 0:
        raise UserError(
            f"--data {name} of small images is normalised by its training images; "
            "--data-root must hold train/CLASS/ too"
        )
    # From the histogram of each channel: floats of all pixels would take many times their memory.
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([x.flatten().bincount(minlength=256) for x in training_subset.images.unbind(1)])
    mean = (counts * levels).sum(1) / counts.sum(1)
    variance = (counts * (levels - mean[:, None]) ** 2).sum(1) / (counts.sum(1) - 1)
    return [round(x, 4) for x in mean.tolist()], [round(max(x, 1e-3), 4) for x in variance.sqrt().tolist()]
