"""Batches of normalised float tensors on the training device.

Example:
    batches = FileBatches(subset, (evaluation, training), settings, True, normalize, Shard())
    for images, targets in batches.epoch(0): ...   # training: (N, 3, H, W), (N,)
    for images, targets in batches: ...            # evaluation

Small images live on the device as bytes, and a whole batch is cropped and flipped there at once; large ones
are decoded by threads. Order and augmentation are functions of (seed, epoch, step) alone, so a run can be
resumed at any step, with any number of threads.
"""

import copy
import hashlib
import os
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from image_data.defaults import num_workers
from image_data.reading import read_image
from image_data.subsets import Shard, Subset
from image_data.threads import map_batches
from image_data.transforms import CROP_PADDING, DrawsFrom, Transform, crop_and_flip, make_augmentation
from models.normalizer import Normalizer
from utils import UserError, print_error

Batch = tuple[Tensor, Tensor]
UNREADABLE_HINT = "repair or remove it, or leave it out with --skip-unreadable"


class Batches(ABC):
    """Batches of one subset of a data set: shuffled in training (``epoch``), in order in evaluation.

    Args:
        subset: The images.
        settings: The settings batch_size (of all processes together), accumulate, gpu, seed and augment; for
            files also workers and skip_unreadable.
        augment: Whether ``epoch`` augments.
        normalize: The normalisation, whose device is that of the batches.
        shard: The share of every batch that this process gets.
    """

    def __init__(
        self, subset: Subset, settings: Namespace, augment: bool, normalize: Normalizer, shard: Shard
    ):
        self.batch_size, self.shard = settings.batch_size, shard
        if self.batch_size % self.shard.world_size:
            raise UserError(
                f"--batch-size {self.batch_size} cannot be shared by {self.shard.world_size} processes; "
                "use a multiple"
            )
        # An evaluation, which uses one GPU, has to fit into the memory that a training step has.
        num_parts = shard.world_size * settings.accumulate * len(settings.gpu or (0,))
        self.evaluation_batch_size = max(1, self.batch_size // num_parts)
        self.num_images, self.seed = len(subset), settings.seed
        self.augment = settings.augment if augment else "none"
        self.normalize, self.device = normalize, normalize.device
        # Indices of images that this process found unreadable in an evaluation.
        self.unreadable: set[int] = set()
        # Indices that this process evaluates; None for its share of all images.
        self.evaluated_indices: Tensor | None = None

    @abstractmethod
    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this process's share of an epoch's batches, shuffled and augmented.

        The last incomplete batch is left out.

        Args:
            epoch: Number of the epoch, from 0.
            first_step: Step to begin at.
        """

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's images once, in order, as evaluation sees them."""

    def __len__(self) -> int:
        """Return the number of steps per epoch."""
        return self.num_images // self.batch_size

    def local_indices(self) -> Tensor:
        """Return the indices of the images that this process evaluates, if they were not found unreadable."""
        indices = self.evaluated_indices
        if indices is None:
            indices = torch.arange(self.num_images)[self.shard.rank :: self.shard.world_size]
        return indices[~torch.isin(indices, torch.tensor(sorted(self.unreadable), dtype=torch.int64))]

    def spread(self, count: int) -> "Batches":
        """Return batches of about ``count`` of this process's images, evenly spread over their order."""
        indices, batches = self.local_indices(), copy.copy(self)
        rows = torch.linspace(0, len(indices) - 1, min(count, len(indices))).long()
        batches.evaluated_indices = indices[rows]
        return batches

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Return an image as evaluation sees it, not normalised: bytes (3, H, W)."""

    def _generator(self, epoch: int) -> torch.Generator:
        # One 64-bit seed from two numbers, far apart for neighbouring ones.
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _steps(self, order: Tensor, first_step: int) -> Iterator[Tensor]:
        """Yield this process's share of ``order`` for every step."""
        share = self.batch_size // self.shard.world_size
        for step in range(first_step, len(self)):
            start = step * self.batch_size + self.shard.rank * share
            yield order[start : start + share]


class InMemoryBatches(Batches):
    """Batches of small images, (N, 3, H, W) bytes that live on the device; arguments as for ``Batches``."""

    def __init__(
        self, subset: Subset, settings: Namespace, augment: bool, normalize: Normalizer, shard: Shard
    ):
        super().__init__(subset, settings, augment, normalize, shard)
        self.images, self.targets = subset.images.to(self.device), subset.targets.to(self.device)
        self.augmentation = make_augmentation(self.augment)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from ``first_step`` on."""
        generator = self._generator(epoch)
        order = torch.randperm(self.num_images, generator=generator)
        # All random numbers of the epoch are drawn and sent at once: no step waits for a transfer.
        offsets = torch.randint(2 * CROP_PADDING + 1, (self.num_images, 2), generator=generator).to(
            self.device
        )
        flips = torch.randint(2, (self.num_images,), generator=generator, dtype=torch.bool).to(self.device)
        seeds = _image_seeds(self.num_images, generator)
        on_host = self._steps(order, first_step)  # for the seeds
        for indices, own in zip(self._steps(order.to(self.device), first_step), on_host, strict=True):
            images = self.images[indices]
            if self.augment != "none":
                images = crop_and_flip(images, offsets[indices], flips[indices])
            if self.augmentation is not None:
                # One by one, as torchvision draws one operation for everything it is given.
                pairs = zip(images, seeds[own].tolist(), strict=True)
                images = torch.stack([_seeded(self.augmentation, image, seed) for image, seed in pairs])
            yield self.normalize(images), self.targets[indices]

    def image(self, index: int) -> Tensor:
        """Return an image as evaluation sees it, not normalised: bytes (3, H, W)."""
        return self.images[index]

    def __iter__(self) -> Iterator[Batch]:
        """Yield the images of this process once."""
        for indices in self.local_indices().to(self.device).split(self.evaluation_batch_size):
            yield self.normalize(self.images[indices]), self.targets[indices]


class FileBatches(Batches):
    """Batches of image files that threads decode, augment and resize.

    Args:
        subset: The images, as files.
        transforms: The transforms of evaluation and of training.
        settings: The settings that ``Batches`` needs.
        augment: Whether ``epoch`` augments.
        normalize: The normalisation, which also gives the device.
        shard: The share of every batch that this process gets.
    """

    def __init__(
        self,
        subset: Subset,
        transforms: tuple[Transform, Transform],
        settings: Namespace,
        augment: bool,
        normalize: Normalizer,
        shard: Shard,
    ):
        super().__init__(subset, settings, augment, normalize, shard)
        self.workers, self.skip_unreadable = num_workers(settings.workers), settings.skip_unreadable
        self.files, self.targets = [os.fspath(file) for file in subset.files], subset.targets.tolist()
        self.plain, training = transforms
        self.augmented = self.plain if self.augment == "none" else training
        self._reported_unreadable: set[int] = set()

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from ``first_step`` on.

        With ``skip_unreadable`` the next readable image of the epoch's order takes the place of an unreadable
        one.
        """
        generator = self._generator(epoch)
        order = torch.randperm(self.num_images, generator=generator)
        seeds = _image_seeds(self.num_images, generator)

        def read(place: int) -> tuple[Tensor, int]:
            seed = int(seeds[order[place]])
            for next_place in chain(range(place, self.num_images), range(place)):
                index = int(order[next_place])
                transform = partial(_seeded, self.augmented, seed=seed)
                image = self._read(index, transform, then="; then continue with --resume")
                if image is not None:
                    return image, self.targets[index]
            raise UserError("none of the training images can be read")

        places = self._steps(torch.arange(self.num_images), first_step)
        return self._load(read, places)

    def image(self, index: int) -> Tensor:
        """Return an image as evaluation sees it, not normalised: bytes (3, H, W)."""
        return read_image(self.files[index], self.plain)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the images of this process once; with ``skip_unreadable`` only those that can be read."""

        def read(index: int) -> tuple[Tensor, int] | None:
            image = self._read(index, self.plain)
            if image is None:
                self.unreadable.add(index)
                return None
            return image, self.targets[index]

        return self._load(read, self.local_indices().split(self.evaluation_batch_size))

    def check(self) -> list[str]:
        """Read all images of this process, and return a line about each that is unreadable."""

        def problem(index: int) -> str | None:
            try:
                read_image(self.files[index], _load_reduced)
            except UserError as error:
                return str(error)
            return None

        batches = (indices.tolist() for indices in self.local_indices().split(64))
        lines = chain.from_iterable(map_batches(problem, batches, self.workers))
        return [line for line in lines if line is not None]

    def _read(self, index: int, transform: Transform, then: str = "") -> Tensor | None:
        """Return an image, or None for an unreadable one that may be skipped; it is named once.

        Args:
            index: Index of the image.
            transform: Function of the opened image.
            then: End of the error's line: what to do after the repair.
        """
        try:
            return read_image(self.files[index], transform)
        except UserError as error:
            if not self.skip_unreadable:
                raise UserError(f"{error}; {UNREADABLE_HINT}{then}") from None
            if index not in self._reported_unreadable:
                self._reported_unreadable.add(index)
                with tqdm.external_write_mode():
                    print_error(f"skipped: {error}")
            return None

    def _load(self, read: Callable[[int], Any], steps: Iterator[Tensor]) -> Iterator[Batch]:
        for results in map_batches(read, (indices.tolist() for indices in steps), self.workers):
            pairs = [pair for pair in results if pair is not None]
            if not pairs:
                continue
            # Stack in NHWC, the memory order of the images.
            images = torch.stack([image.permute(1, 2, 0) for image, _ in pairs]).permute(0, 3, 1, 2)
            targets = torch.tensor([target for _, target in pairs])
            if self.device.type == "cuda":
                images, targets = images.pin_memory(), targets.pin_memory()
            images, targets = (x.to(self.device, non_blocking=True) for x in (images, targets))
            yield self.normalize(images), targets


def _image_seeds(num_images: int, generator: torch.Generator) -> Tensor:
    """Draw a seed for every image, so that its augmentation does not depend on who makes it, or when."""
    return torch.randint(2**62, (num_images,), generator=generator)


def _seeded(transform: Callable[[Any], Tensor], image: Any, seed: int) -> Tensor:
    with DrawsFrom(torch.Generator().manual_seed(seed)):
        return transform(image)


def _load_reduced(image: Image.Image) -> None:
    image.draft(None, (1, 1))  # all of a JPEG is read, but only an eighth of its pixels per side is made
    image.load()
