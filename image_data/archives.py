"""CIFAR-10 and CIFAR-100 from torchvision's archives."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from image_data.subsets import Subset
from models.errors import first_line
from utils import UserError, is_folder

READERS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def read_cifar(name: str, root: Path) -> tuple[Subset, Subset, list[str]]:
    """Return training images, test images and class names of the archive in ``root``.

    An archive that is not there is downloaded.

    Raises:
        UserError: There is none, and it cannot be downloaded.
    """
    missing = [folder for folder in (root, *root.parents) if not is_folder(folder)]
    try:
        train, test = _archive(READERS[name], root)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):  # something is in one of them
            for folder in missing:
                folder.rmdir()
        raise UserError(
            f"no {name} in --data-root {root}, and no download ({first_line(error)}); "
            "put torchvision's archive or the folders train/CLASS/ and test/CLASS/ there"
        ) from None
    return _subset(train), _subset(test), list(train.classes)


def _archive(reader: type[CIFAR10], root: Path) -> tuple[CIFAR10, CIFAR10]:
    try:
        return reader(root, train=True), reader(root, train=False)
    except RuntimeError:  # not there, or not complete
        with _one_process_at_a_time(root):
            return reader(root, train=True, download=True), reader(root, train=False, download=True)


def _subset(images: CIFAR10) -> Subset:
    return Subset(
        torch.tensor(images.targets), torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
    )


@contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Let one of the processes on this machine download; the others then find the files."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
