"""Every data set as training and test images: the demo, CIFAR's archives, and folders of images.

Example:
    data_set = find_data_set(settings, image_size=224)
    data_set.train.files, data_set.test.targets, data_set.class_names

Folders are ``train/CLASS/`` and ``test/CLASS/`` (or ``val/CLASS/``); with ``--test-size`` only
``train/CLASS/``, or ``CLASS/`` alone.
"""

import hashlib
import os
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch

from image_data import synthetic
from image_data.archives import read_cifar
from image_data.folders import FolderScan, suffixes_in_words, text_of
from image_data.split import Role, choose_test, roles_in
from image_data.subsets import DataSet, Subset, name_digests
from models.description import DataInfo, Split
from utils import UserError, is_folder, listed

Classes = dict[str, list[Path]]
# In lower case, what other programs and people call the folders of training and test images.
SUBSET_FOLDER_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation")


class Folders(NamedTuple):
    """Folders of images that belong together."""

    train: Classes
    train_folder: Path
    test: Classes
    test_folder: Path
    notes: list[str]


def find_data_set(
    settings: Namespace,
    image_size: int,
    stored: DataInfo | None = None,
    split: Split | None = None,
    only_test: bool = False,
    origin_split: Split | None = None,
) -> DataSet:
    """Find the data set that ``settings`` name.

    Args:
        settings: The settings data, data_root, test_size and split_seed.
        image_size: Image size of the demo; for CIFAR it is checked.
        stored: The checkpoint's ``DataInfo``; its classes keep their order.
        split: The checkpoint's split; if test images are split off, they are those that it knows.
        only_test: Whether to leave folders of training images alone.
        origin_split: Split of the network to start from; if test images are split off, they are others than
            it knows where possible.

    Raises:
        UserError: Missing, empty or closed folders, or classes that differ between training and test images.
    """
    if settings.data == "demo":
        train, test = (
            Subset(targets, images)
            for images, targets in (synthetic.demo(subset, image_size) for subset in ("train", "test"))
        )
        return DataSet("demo", train, test, list(synthetic.CLASS_NAMES), [_pixel_digest(train)], [])
    has_folders = any(
        is_folder(settings.data_root / name) for name in (("test", "val") if only_test else ("train",))
    )
    if settings.data in ("cifar10", "cifar100") and not has_folders:
        if image_size != 32:
            raise UserError(f"--image-size {image_size} is not that of {settings.data}, 32")
        train, test, class_names = read_cifar(settings.data, settings.data_root)
        return DataSet(settings.data, train, test, class_names, [_pixel_digest(train)], [])
    return _from_folders(settings, stored, split, only_test, origin_split)


def _pixel_digest(subset: Subset) -> str:
    return hashlib.sha256(subset.images.numpy()).hexdigest()


def _from_folders(
    settings: Namespace,
    stored: DataInfo | None,
    split: Split | None,
    only_test: bool,
    origin_split: Split | None,
) -> DataSet:
    if settings.test_size is None:
        folders = _find_folders(settings, stored, only_test)
    else:
        folders = _split_folders(settings, split, origin_split)
    class_names = _in_order(folders.test, stored)
    if stored is None:
        _refuse_single_class(folders, class_names)
    train, test = (_file_subset(classes, class_names) for classes in (folders.train, folders.test))
    names = _names(train, folders.train_folder)
    test_names = [] if settings.test_size is None else _names(test, folders.test_folder)
    return DataSet(settings.data, train, test, class_names, names, folders.notes, test_names)


def _find_folders(settings: Namespace, stored: DataInfo | None, only_test: bool) -> Folders:
    """Find ``train/`` and ``test/`` or ``val/``."""
    root, scan = settings.data_root, FolderScan()
    if is_folder(root) and not os.access(root, os.X_OK):
        raise UserError(f"--data-root {root} may not be entered")
    train = {} if only_test else scan.classes(root / "train")
    folders = [root / name for name in (("val", "test") if settings.data == "imagenet" else ("test", "val"))]
    classes_in = {folder: scan.classes(folder) for folder in folders}
    _refuse_closed(scan)
    known = set(train) or set(stored.class_names if stored else ())
    # A test folder may be empty or without labels; the other one then serves.
    labelled = [folder for folder in folders if _has_images(classes_in[folder], known)]
    fitting = labelled or [folder for folder in folders if classes_in[folder]]
    if not fitting or not (train or only_test):
        raise UserError(_what_is_missing(root, bool(train), [folder.name for folder in fitting]))
    test_folder = fitting[0]
    notes = scan.complaints()
    if is_folder(folders[0]) and folders[0] != test_folder:
        notes.append(
            f"the test images are those of {test_folder}, as {folders[0]} has none in folders of the classes"
        )
    result = Folders(train, root / "train", classes_in[test_folder], test_folder, notes)
    if not only_test:
        _refuse_different_classes(result)
    for folder, classes in ((result.train_folder, train), (test_folder, result.test)):
        _refuse_empty_classes(folder, classes)
    return result


def _split_folders(settings: Namespace, split: Split | None, origin_split: Split | None) -> Folders:
    """Split test images off those of ``train/CLASS/``, or ``CLASS/``."""
    root, scan = settings.data_root, FolderScan()
    has_train = bool(scan.inner_folders(root / "train"))  # else it is a class: trains among other vehicles
    for folder in (root / "test", root / "val"):
        if has_train and _has_images(scan.classes(folder), set()):
            raise UserError(f"{folder} holds test images: --test-size is for data without them")
    folder = root / "train" if has_train else root
    scan = FolderScan()
    classes = dict(sorted(scan.classes(folder).items()))
    _refuse_closed(scan)
    if not classes or _are_subset_folders(classes) or (folder == root and _inner_data_set(root)):
        raise UserError(_what_is_missing(root, False, []))
    _refuse_empty_classes(folder, classes)
    files = _file_subset(classes, list(classes))
    found = name_digests(_names(files, folder))
    roles = None if origin_split is None else roles_in(origin_split, found)
    if split is not None and len(split.test_digests):
        is_test = torch.isin(found, split.test_digests)
    elif split is not None and len(split.name_digests):  # an older file
        is_test = ~torch.isin(found, split.name_digests)
    else:
        is_test = choose_test(files.targets, settings.test_size, settings.split_seed, roles)
    subsets: tuple[Classes, Classes] = ({name: [] for name in classes}, {name: [] for name in classes})
    labels = [name for name, of_class in classes.items() for _ in of_class]
    for name, path, is_of_test in zip(labels, files.files, is_test.tolist(), strict=True):
        subsets[is_of_test][name].append(path)
    note = (
        f"{int(is_test.sum()):,} of the {len(files):,} images of {folder} are the test images (--test-size)"
    )
    notes = [*scan.complaints(), note]
    if roles is not None and (known := int((roles[is_test] != Role.UNKNOWN).sum())):
        notes.append(f"{known:,} of the test images trained the network to start from, or chose its epoch")
    return Folders(subsets[0], folder, subsets[1], folder, notes)


def _names(subset: Subset, folder: Path) -> list[str]:
    return [text_of(path.relative_to(folder)) for path in subset.files]


def _file_subset(classes: Classes, class_names: list[str]) -> Subset:
    files = [path for name in class_names for path in classes.get(name, [])]
    labels = [label for label, name in enumerate(class_names) for _ in classes.get(name, [])]
    return Subset(torch.tensor(labels, dtype=torch.int64), files=files)


def _in_order(classes: Classes, stored: DataInfo | None) -> list[str]:
    """Return the class names in the order of a checkpoint; without one, sorted, numbers as such."""
    if stored and sorted(stored.class_names) == sorted(classes):
        return stored.class_names
    are_numbers = all(name.isascii() and name.isdecimal() for name in classes)
    return sorted(classes, key=lambda name: (int(name) if are_numbers else 0, name))


def _has_images(classes: Classes, known: set[str]) -> bool:
    """Return True if one of the ``known`` classes has an image; of any class if none is known."""
    return any(files for name, files in classes.items() if not known or name in known)


def _are_subset_folders(classes: Classes) -> bool:
    """Return True if what looks like classes are folders of training and test images."""
    return bool(classes) and all(name.lower() in SUBSET_FOLDER_NAMES for name in classes)


def _inner_data_set(root: Path) -> Path | None:
    """Return the first folder in ``root`` with folders ``train/CLASS/``, as unpacked archives have one."""
    scan = FolderScan()
    folders = (root / name for name in sorted(scan.inner_folders(root)))
    return next((folder for folder in folders if scan.inner_folders(folder / "train")), None)


def _refuse_closed(scan: FolderScan) -> None:
    if scan.closed:
        raise UserError(scan.complaints()[0])


def _refuse_empty_classes(folder: Path, classes: Classes) -> None:
    if empty := [name for name, files in classes.items() if not files]:
        raise UserError(f"{folder / empty[0]} holds no image ({suffixes_in_words()})")


def _refuse_different_classes(folders: Folders) -> None:
    missing = {
        folders.train_folder: [name for name in folders.test if name not in folders.train],
        folders.test_folder: [name for name in folders.train if name not in folders.test],
    }
    if any(missing.values()):
        lacks = (f"{folder} lacks {listed(sorted(names))}" for folder, names in missing.items() if names)
        raise UserError(
            f"{folders.train_folder} and {folders.test_folder} must have the same classes: {'; '.join(lacks)}"
        )


def _refuse_single_class(folders: Folders, class_names: list[str]) -> None:
    if len(class_names) > 1:
        return
    folder, name = folders.train_folder if folders.train else folders.test_folder, class_names[0]
    count = len(folders.train.get(name, [])) or len(folders.test[name])
    inner = sorted(map(text_of, FolderScan().inner_folders(folder / name)))
    hint = (
        f" in the folders {listed(inner)}; if these are the classes, move them up into {folder}"
        if inner
        else ""
    )
    raise UserError(
        f"at least two classes are needed; {folder} holds one, {name}, with {count:,} images{hint}"
    )


def _what_is_missing(root: Path, has_train: bool, tests: list[str]) -> str:
    """Say in one line which folders are there and which are not."""
    if not is_folder(root):
        return f"there is no folder {root} (--data-root)"
    split_off, scan = "--test-size 20% splits test images off", FolderScan()
    if has_train:
        if unsorted := next((name for name in ("val", "test") if scan.images([root / name])), None):
            return f"{root}/{unsorted} has images, but no classes: sort them into {unsorted}/CLASS/"
        return (
            f"{root} has train/ but no test images: put a fifth or so of every class into "
            f"{root}/test/CLASS/ (or val/CLASS/), or {split_off}"
        )
    if tests:
        return f"{root} has {tests[0]}/ but no training images in folders train/CLASS/"
    if inner := _inner_data_set(root):
        return f"{root} has no train/CLASS/, but {inner} has: use --data-root {inner}"
    classes = {name: files for name, files in scan.classes(root).items() if files}
    if _are_subset_folders(classes):
        if is_folder(root / "train"):
            return f"{root}/train has no folders of classes: images belong in train/CLASS/ and test/CLASS/"
        return (
            f"{root} has the folders {listed(sorted(classes))}, but no train/ and no test/ (or val/): "
            "rename them to these"
        )
    if classes:
        return (
            f"{root} has images in the folders {listed(sorted(classes))}, but no train/CLASS/, test/CLASS/: "
            f"if these are the classes, {split_off}"
        )
    images = scan.images([root])
    found = f"{len(images):,} images, but no folder of a class" if images else "no image"
    return (
        f"{root} holds {found}: images belong in train/CLASS/ and test/CLASS/ (or val/CLASS/); "
        "an archive needs --data or --preset, which say what it is"
    )
