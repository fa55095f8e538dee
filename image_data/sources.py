"""Images of every data set: found in folders or archives, checked, split and read.

    files, complaints = find_images([Path("photos")])
    pixels = read_image(files[0], evaluation_transform(224))   # bytes (3, 224, 224)

Hidden files and folders are neither images nor classes, symbolic links are followed, and every real folder is entered once. Names may be
any bytes; what is remembered of them is the same text on every system.
"""

import fcntl
import hashlib
import itertools
import os
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from image_data import synthetic
from models.saved import DataInfo
from settings import Settings
from utils import UserError, is_folder

SUFFIXES = (*IMG_EXTENSIONS, ".jfif")
FORMATS = (
    "JPEG",
    "PNG",
    "PPM",
    "BMP",
    "TIFF",
    "WEBP",
    "GIF",
)  # whatever the suffix says; for others PIL may start programs
NO_CONTENT = ("__MACOSX", "lost+found")  # besides names that begin with a dot

LARGEST_IN_MEMORY = 64  # pixels a side; larger images stay files
LARGE_CROP_SHARE = 0.875  # of the shorter side of images larger than that
LARGEST_SIDES_RATIO = 200  # of an image; resizing the shorter side would make the longer one enormous
MAX_PIXELS = 89_478_485  # of an image that is decoded in full, PIL's own limit
MAX_JPEG_PIXELS = (
    16384 * 12288
)  # of the largest phone cameras; beyond MAX_PIXELS they are decoded at a fraction of their size
REDUCED_SIDE = 1024  # pixels that such a JPEG keeps at least
HELD_OUT_SHARE = 10  # percent of a folder's training images, where --val-size does not say
WAYS_ON = "mend or remove it, or leave it out with --skip-unreadable"
LEFT_OUT = "left out: "  # begins the line that counts files which are no images; no mistake
MAX_GONE = 10  # percent of a checkpoint's training images; with more missing, the data are others

DEMO_IMAGES = {"train": 13000, "test": 2000}
DEMO_SEEDS = {"train": 1, "test": 2}

NORMALIZATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Part:
    """One part of a data set: small images as bytes (N, 3, H, W), or files."""

    targets: Tensor
    images: Tensor | None = None
    files: list[Path] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Tensor) -> "Part":
        """The images with these indices, which are sorted."""
        if len(indices) == len(self):  # all of them: no copy
            return self
        return Part(
            self.targets[indices],
            None if self.images is None else self.images[indices],
            None if self.files is None else [self.files[i] for i in indices.tolist()],
        )


@dataclass(frozen=True)
class Found:
    """A data set before it is split. ``names`` are those of the training images, or a digest of all their pixels; ``notes`` are lines for
    the user; ``sorted_by_name`` tells that classes are numbered by their folders' names, which another program may not share."""

    name: str
    train: Part
    test: Part
    class_names: list[str]
    names: list[str]
    notes: list[str]
    sorted_by_name: bool = False

    @property
    def fingerprint(self) -> str:
        """Of the names of classes and training images."""
        return hashlib.sha256("\n".join([self.name, *self.class_names, *self.names]).encode()).hexdigest()[
            :16
        ]


def find(settings: Settings, image_size: int, stored: DataInfo | None, only_test: bool) -> Found:
    """The data set that ``settings`` name; with ``only_test`` folders of training images are left alone.

    Args:
        stored: what a checkpoint remembers; its classes keep their order.

    Raises:
        UserError: missing, empty or closed folders, or classes that differ between training and test images.
    """
    if settings.data == "demo":
        drawn = [
            synthetic.generate(DEMO_IMAGES[part], DEMO_SEEDS[part], image_size) for part in ("train", "test")
        ]
        train, test = (Part(targets, images) for images, targets in drawn)
        return Found(
            "demo",
            train,
            test,
            list(synthetic.CLASS_NAMES),
            [hashlib.sha256(train.images.numpy()).hexdigest()],
            [],
        )
    has_folders = any(
        is_folder(settings.data_root / name) for name in (("test", "val") if only_test else ("train",))
    )
    if settings.data in ("cifar10", "cifar100") and not has_folders:
        return Found(settings.data, *cifar_archive(settings.data, settings.data_root, image_size), notes=[])
    return _find_folders(settings, stored, only_test)


def _find_folders(settings: Settings, stored: DataInfo | None, only_test: bool) -> Found:
    root, survey = settings.data_root, _Survey()
    if is_folder(root) and not os.access(root, os.X_OK):
        raise UserError(f"--data-root {root} may not be entered")
    train = {} if only_test else survey.classes(root / "train")
    known = set(train) or set(stored.class_names if stored else ())
    folders = [root / name for name in (("val", "test") if settings.data == "imagenet" else ("test", "val"))]
    found = {folder: survey.classes(folder) for folder in folders}
    # A test folder may be empty or without labels; the other one then serves.
    fitting = [
        folder
        for folder in folders
        if any(files for name, files in found[folder].items() if not known or name in known)
    ]
    fitting = fitting or [folder for folder in folders if found[folder]]
    if survey.closed:
        raise UserError(survey.complaints()[0])
    if not fitting or not (train or only_test):
        raise UserError(
            f"--data-root {root} must hold the folders train/CLASS/ with most images of every class, and test/CLASS/ (or val/CLASS/) "
            "with the rest, a fifth or so; or say by --data or --preset which data set it is"
        )
    test = found[fitting[0]]
    if not only_test and set(train) != set(test):
        names = ", ".join(sorted(set(train) ^ set(test))[:5])
        raise UserError(
            f"{root / 'train'} and {fitting[0]} must have the same classes; only one of them has: {names}"
        )
    for folder, classes in ((root / "train", train), (fitting[0], test)):
        if empty := [name for name, files in classes.items() if not files]:
            raise UserError(
                f"{folder / empty[0]} holds no image (a file ending with one of {' '.join(SUFFIXES)})"
            )
    notes = survey.complaints()
    if is_folder(folders[0]) and folders[0] != fitting[0]:
        notes.append(
            f"the test images are those of {fitting[0]}, as {folders[0]} has none in folders of the classes"
        )
    are_numbers = all(name.isascii() and name.isdecimal() for name in test)
    in_order = sorted(test, key=lambda name: (int(name) if are_numbers else 0, name))
    class_names = stored.class_names if stored and sorted(stored.class_names) == sorted(test) else in_order
    # Whoever uses WordNet's names has them in the same order.
    is_wordnet = all(len(name) == 9 and name[0] == "n" and name[1:].isdecimal() for name in class_names)
    names = [
        text_of(path.relative_to(root / "train")) for name in class_names for path in train.get(name, [])
    ]
    parts = (_file_part(classes, class_names) for classes in (train, test))
    return Found(settings.data, *parts, class_names, names, notes, sorted_by_name=not is_wordnet)


def _file_part(classes: dict[str, list[Path]], class_names: list[str]) -> Part:
    pairs = [(path, label) for label, name in enumerate(class_names) for path in classes.get(name, [])]
    return Part(
        torch.tensor([label for _, label in pairs], dtype=torch.int64), files=[path for path, _ in pairs]
    )


class _Survey:
    """Walks through folders; counts by suffix the files that it leaves out, and remembers what may not be entered."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.closed: list[OSError] = []

    def classes(self, folder: Path) -> dict[str, list[Path]]:
        """The images of every class. Names that differ only in how Unicode composes their letters are those of one class."""
        classes = defaultdict(list)
        for _, names, _ in itertools.islice(
            os.walk(folder, onerror=self.closed.append) if is_folder(folder) else (), 1
        ):
            for name in itertools.filterfalse(_is_hidden, names):
                classes[text_of(name)].append(folder / name)
        return {name: self.images(folders) for name, folders in classes.items()}

    def images(self, folders: list[Path]) -> list[Path]:
        """Image files anywhere below, folder by folder in order of their names."""
        seen, found = set(), []
        for root, inner, names in itertools.chain(
            *(os.walk(f, followlinks=True, onerror=self.closed.append) for f in folders)
        ):
            real = Path(root).resolve()
            if real in seen:  # a link led here before; a loop of links would have no end
                inner.clear()
                continue
            seen.add(real)
            inner[:] = sorted(itertools.filterfalse(_is_hidden, inner))
            for name in itertools.filterfalse(_is_hidden, names):
                suffix = Path(name).suffix.lower()
                if suffix in SUFFIXES:
                    found.append((text_of(root), text_of(name), Path(root, name)))
                else:
                    self.left_out[text_of(suffix) or "without extension"] += 1
        return [path for _, _, path in sorted(found)]

    def complaints(self) -> list[str]:
        """A line about every folder that may not be entered, and one about all files left out."""
        closed = [f"cannot enter the folder {error.filename}: {error.strerror}" for error in self.closed]
        kinds = [f"{count:,} {kind}" for kind, count in self.left_out.most_common()]
        return [*closed, *([LEFT_OUT + ", ".join(kinds)] if kinds else [])]


def find_images(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """Image files, folders replaced by the images anywhere below them in order of their names; and complaints, one line each: about folders
    without images, folders that may not be entered, and files that are no images."""
    survey, files, complaints = _Survey(), [], []
    for path in paths:
        found = survey.images([path]) if is_folder(path) else [path]
        if not found:
            complaints.append(
                f"the folder {path} holds no image (a file ending with one of {' '.join(SUFFIXES)})"
            )
        files += found
    return files, complaints + survey.complaints()


def text_of(name: str | Path) -> str:
    """A name as the same text on every system: letters composed (NFC), bytes that are not UTF-8 written as ``\\xe9``."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in NO_CONTENT


def cifar_archive(name: str, root: Path, image_size: int) -> tuple[Part, Part, list[str], list[str]]:
    """Training and test part, class names, and a digest of the training images, of torchvision's archive in ``root``, or downloaded.

    Raises:
        UserError: there is none, and no download.
    """
    reader = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    if image_size != 32:
        raise UserError(f"--image-size {image_size} is not that of {name}, 32")
    missing = [folder for folder in (root, *root.parents) if not is_folder(folder)]
    try:
        try:
            train, test = (reader(root, train=is_train) for is_train in (True, False))
        except RuntimeError:  # not there, or not complete
            with _one_process_at_a_time(root):
                train, test = (reader(root, train=is_train, download=True) for is_train in (True, False))
    except (OSError, RuntimeError) as error:
        with suppress(OSError):  # something is in one of them
            for folder in missing:
                folder.rmdir()
        raise UserError(
            f"no {name} in --data-root {root}, and no download ({str(error).splitlines()[0]}); "
            f"put torchvision's archive or the folders train/CLASS/ and test/CLASS/ there"
        ) from None
    parts = [
        Part(torch.tensor(d.targets), torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous())
        for d in (train, test)
    ]
    return *parts, list(train.classes), [hashlib.sha256(parts[0].images.numpy()).hexdigest()]


@contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Of the processes torchrun started on this machine one downloads, the others then find the files."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def name_digests(names: list[str]) -> Tensor:
    """64 bits of every name, int64 (N,): enough to find the images of a checkpoint again."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return torch.tensor(
        [int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64
    )


def recognise(found: Found, stored: DataInfo | None, digests: Tensor | None) -> Tensor:
    """Number of every training image among those that a checkpoint knows, -1 for one it does not know.

    Images may have gone or come since: the split of the others stays, and what is unknown belongs to no part of it. ``digests`` are the
    ``name_digests`` of the checkpoint's training images; without them, all must be there.

    Raises:
        UserError: the classes are others, or so are too many of the images.
    """
    numbers, count = torch.arange(len(found.train)), len(found.train)
    if stored is not None and not stored.knows_training_images:
        if len(stored.class_names) != len(found.class_names):
            raise UserError(
                f"the checkpoint has {len(stored.class_names)} classes, the data have {len(found.class_names)}"
            )
        return numbers
    if stored is not None and found.class_names != stored.class_names:
        raise UserError(
            f"the checkpoint has {len(stored.class_names)} classes, the data have {len(found.class_names)} or other names"
        )
    if (
        stored is None
        or count == 0
        or (count, found.fingerprint) == (stored.num_training_images, stored.fingerprint)
    ):
        return numbers
    if digests is not None and len(digests) == stored.num_training_images and len(found.names) == count:
        known = {digest: i for i, digest in enumerate(digests.flatten().tolist())}
        numbers = torch.tensor([known.get(digest, -1) for digest in name_digests(found.names).tolist()])
        new = int((numbers < 0).sum())
        gone = stored.num_training_images - (count - new)
        if 100 * gone <= MAX_GONE * stored.num_training_images:
            found.notes.append(
                f"of the checkpoint's training images {gone:,} have gone; {new:,} new ones are left out"
            )
            return numbers
    raise UserError(
        f"the data are not those of the checkpoint: it knows {stored.num_training_images} training images of {stored.name}, "
        f"these are {count}, or others; its held-out split would mix with training images"
    )


def choose_held_out(num_images: int, val_size: int | None, split_seed: int) -> Tensor:
    """Sorted indices of ``val_size`` of ``num_images`` training images; None: ``HELD_OUT_SHARE``.

    Raises:
        UserError: fewer than one image would be left to train on.
    """
    size = max(1, num_images * HELD_OUT_SHARE // 100) if val_size is None else val_size
    if size >= num_images > 0:
        raise UserError(
            f"--val-size {size} holds out all of the {num_images} training images; it must be smaller"
        )
    return (
        torch.randperm(num_images, generator=torch.Generator().manual_seed(split_seed))[:size].sort().values
    )


def read_files(part: Part, image_size: int, skip: bool, notes: list[str]) -> Part:
    """``part`` after all its files were read: small images as bytes; of large ones only that they can be read is found out.

    Args:
        skip: leave out, with a note, what cannot be read.

    Raises:
        UserError: an image cannot be read, and is not to be skipped.
    """
    if part.files is None:
        return part
    transform, is_small = evaluation_transform(image_size), image_size <= LARGEST_IN_MEMORY

    def pixels(image: Image.Image) -> np.ndarray | None:
        if not is_small:
            image.draft(None, (1, 1))  # all of a JPEG is read, but an eighth of its pixels a side made
            image.load()
            return None
        image = rgb(image)
        return (
            np.asarray(image).transpose(2, 0, 1)
            if image.size == (image_size, image_size)
            else transform(image).numpy()
        )

    def attempt(path: Path) -> np.ndarray | UserError | None:
        try:
            return read_image(path, pixels)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(attempt, part.files))
    errors = [result for result in results if isinstance(result, UserError)]
    if errors:
        summary = str(errors[0]) + (f", nor {len(errors) - 1:,} others" if len(errors) > 1 else "")
        if not skip:
            raise UserError(f"{summary}; {WAYS_ON}")
        notes.append(f"skipped: {summary}")
        part = part.take(
            torch.tensor([not isinstance(result, UserError) for result in results]).nonzero().flatten()
        )
    images = [result for result in results if isinstance(result, np.ndarray)] or np.empty(
        (0, 3, image_size, image_size), np.uint8
    )
    return (
        Part(part.targets, torch.from_numpy(np.stack(images) if len(images) else images))
        if is_small
        else part
    )


def evaluation_transform(image_size: int) -> v2.Transform:
    """Opened image -> bytes (3, image_size, image_size): the central square, of 7/8 of the shorter side for large images."""
    resized = image_size if image_size <= LARGEST_IN_MEMORY else round(image_size * 8 / 7)
    return v2.Compose([rgb, v2.Resize(resized, antialias=True), v2.CenterCrop(image_size), v2.PILToTensor()])


def read_image(path: str | Path, transform: Callable[[Image.Image], Any] | None = None) -> Any:
    """What ``transform`` makes of an image file that was opened and not decoded yet; None: the image in RGB.

    Raises:
        UserError: it cannot be read, or is so large that it looks like a decompression bomb; the file is named.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not path.is_file():  # opening a pipe would wait for ever
                raise OSError("there is no such file")
            Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS
            with Image.open(path, formats=FORMATS) as image:
                if max(image.size) > LARGEST_SIDES_RATIO * min(image.size):
                    raise ValueError(f"its sides of {image.width} and {image.height} pixels differ too much")
                if image.width * image.height > (
                    MAX_JPEG_PIXELS if image.format in ("JPEG", "MPO") else MAX_PIXELS
                ):
                    raise ValueError(
                        f"its {image.width} x {image.height} pixels could be a decompression bomb"
                    )
                return (transform or rgb)(_in_bytes(image) if image.mode[0] in "IF" else image)
    except Exception as error:  # what a decoder raises on damaged bytes depends on the format
        raise UserError(
            f"cannot read the image {path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None


def _in_bytes(image: Image.Image) -> Image.Image:
    """Gray values of 16 or 32 bits, or floats, from the darkest to the brightest in the image; PIL would cut them off at 255."""
    values = np.asarray(image, dtype=np.float64)
    is_number = np.isfinite(values)
    low, high = (values[is_number].min(), values[is_number].max()) if is_number.any() else (0.0, 0.0)
    scaled = (np.where(is_number, values, low) / 2 - low / 2) / (high / 2 - low / 2 or 1.0)
    gray = Image.fromarray(np.rint(255 * scaled).astype(np.uint8))
    gray.info = image.info
    return gray


def rgb(image: Image.Image) -> Image.Image:
    """In RGB, upright as its EXIF data say; JPEGs of more than ``MAX_PIXELS`` are reduced while they are decoded."""
    if image.width * image.height > MAX_PIXELS:
        image.draft(None, (REDUCED_SIDE, REDUCED_SIDE))
    image = image.convert("RGB")
    with suppress(Exception):  # damaged EXIF data are no reason to lose the image
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    return image
