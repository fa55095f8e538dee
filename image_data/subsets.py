"""The subsets of a data set, before they become batches."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Subset:
    """One subset of a data set: small images as bytes (N, 3, H, W), or files; and their targets (N,)."""

    targets: Tensor
    images: Tensor | None = None
    files: list[Path] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Tensor) -> "Subset":
        """Return the images with these indices, which are sorted."""
        if len(indices) == len(self):  # all of them: no copy
            return self
        return Subset(
            self.targets[indices],
            None if self.images is None else self.images[indices],
            None if self.files is None else [self.files[i] for i in indices.tolist()],
        )


@dataclass(frozen=True)
class DataSet:
    """A data set before images are held out.

    Attributes:
        name: Name of the data set, as of ``--data``.
        train: The training images, before some are held out.
        test: The test images.
        class_names: Names of the classes, in the order of the targets.
        names: Names of the training images, or one digest of all their pixels.
        notes: Lines for the user.
        test_names: Names of the test images where they are split off, else empty.
    """

    name: str
    train: Subset
    test: Subset
    class_names: list[str]
    names: list[str]
    notes: list[str]
    test_names: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """Digest of the names of classes and training images."""
        text = "\n".join([self.name, *self.class_names, *self.names])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def digests(self) -> Tensor:
        """64 bits of the name of every training image, int64 (N,); empty for an archive."""
        return name_digests(self.names if len(self.names) == len(self.train) else [])


def name_digests(names: list[str]) -> Tensor:
    """Return 64 bits of every name, int64 (N,): enough to find the images of a checkpoint again."""
    return _digests(name.encode() for name in names)


def pixel_digests(images: Tensor) -> Tensor:
    """Return 64 bits of the pixels of every image, int64 (N,), of images (N, 3, H, W) uint8 on the CPU."""
    return _digests(image.tobytes() for image in images.numpy())


def _digests(contents: Iterable[bytes]) -> Tensor:
    digests = (hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return torch.tensor(
        [int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64
    )


@dataclass(frozen=True)
class Shard:
    """The share of every batch that process ``rank`` of ``world_size`` gets."""

    rank: int = 0
    world_size: int = 1
