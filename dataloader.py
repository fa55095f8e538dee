"""Images of every data set, as batches of normalised float tensors on the training device.

    data = load_data(settings, device)
    for images, targets in data.train.epoch(0): ...   # (N, 3, H, W), (N,)
    for images, targets in data.test: ...

Small images live on the device as bytes, and a whole batch is cropped and flipped there at once; large ones are decoded by worker
processes. Order and augmentation are functions of (seed, epoch, step) alone, so a run can go on from any step, on any number of workers.
"""

import atexit
import copy
import hashlib
import math
import os
import signal
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from image_data import sources as datasets
from image_data.sources import (
    HELD_OUT_SHARE,
    LARGE_CROP_SHARE,
    LARGEST_IN_MEMORY,
    NORMALIZATION,
    Part,
    evaluation_transform,
    read_image,
)
from models.saved import DataInfo, Split
from settings import Settings
from utils import UserError

Batch = tuple[Tensor, Tensor]

CROP_PADDING = 4
CROP_AREAS, CROP_RATIOS = (
    (0.08, 1.0),
    (3 / 4, 4 / 3),
)  # of random resized crops: share of the image, width by height
TEST_ALONE = ("anytime", "runtime")  # evaluations that need no others


@dataclass(frozen=True)
class Data:
    """The three parts of a data set.

    ``split`` tells the images of ``val`` among the training images; ``notes`` are lines for the user. ``sorted_by_name``: classes are in
    the order of their folders' names.
    """

    info: DataInfo
    split: Split
    notes: list[str]
    sorted_by_name: bool
    train: "Batches"
    val: "Batches"
    test: "Batches"


@dataclass(frozen=True)
class Shard:
    """Part ``rank`` of ``world_size`` processes that share every batch."""

    rank: int = 0
    world_size: int = 1


class Normalizer:
    """Bytes (N, 3, H, W) -> floats, each channel by its mean and standard deviation over the data set (of values 0 to 1)."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device, channels_last: bool = False
    ):
        self.scale = (1 / (255 * torch.tensor(std))).reshape(1, 3, 1, 1).to(device)
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).reshape(1, 3, 1, 1).to(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        return torch.addcmul(
            self.shift, images.to(torch.float32, memory_format=self.memory_format), self.scale
        )


class Batches:
    """Batches of one part of a data set: ``epoch(e)`` shuffles, augments and leaves out the last incomplete batch; iterating gives this
    process's images once, in order; ``picture(i)`` is an image as the network sees it in evaluation, before normalisation: bytes (3, H, W).

    Args:
        settings: batch_size, of all processes together; seed; workers, which decode files.
        augment: the flag's value, "none" for all but training images.
    """

    def __init__(
        self, num_images: int, settings: Settings, augment: str, normalize: Normalizer, shard: Shard
    ):
        self.batch_size, self.shard = settings.batch_size, shard
        if self.batch_size % self.shard.world_size:
            raise UserError(
                f"--batch-size {self.batch_size} cannot be shared by {self.shard.world_size} processes; use a multiple"
            )
        self.num_images, self.seed, self.workers = num_images, settings.seed, settings.workers
        self.augment, self.normalize, self.device = augment, normalize, normalize.scale.device
        self.chosen: Tensor | None = None  # indices to evaluate, None for all

    def __len__(self) -> int:
        """Steps an epoch."""
        return self.num_images // self.batch_size

    def _generator(self, epoch: int) -> torch.Generator:
        # One 64-bit seed out of two numbers, far apart for neighbouring ones.
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _steps(self, order: Tensor, first_step: int) -> Iterator[Tensor]:
        """This process's part of every step's images."""
        share = self.batch_size // self.shard.world_size
        for step in range(first_step, len(self)):
            start = step * self.batch_size + self.shard.rank * share
            yield order[start : start + share]

    def left_out(self, epoch: int) -> Tensor:
        """Sorted indices of the images that an epoch has no whole batch for."""
        order = torch.randperm(self.num_images, generator=self._generator(epoch))
        return order[len(self) * self.batch_size :].sort().values

    def own(self) -> Tensor:
        """Return the indices of the images this process evaluates."""
        if self.chosen is not None:
            return self.chosen
        return torch.arange(self.num_images)[self.shard.rank :: self.shard.world_size]

    def spread(self, count: int) -> "Batches":
        """Return batches of about ``count`` of this process's images, evenly spread over the classes, which follow one another."""
        own = self.own()
        part = copy.copy(self)
        part.chosen = own[torch.linspace(0, len(own) - 1, min(count, len(own))).long()]
        return part


class InMemoryBatches(Batches):
    """Batches of small images, (N, 3, H, W) bytes that live on ``device``."""

    def __init__(self, images: Tensor, targets: Tensor, *how: Any):
        super().__init__(len(images), *how)
        self.images, self.targets = images.to(self.device), targets.to(self.device)
        self.policy = _augmentation_policy(self.augment)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        generator = self._generator(epoch)
        order = torch.randperm(self.num_images, generator=generator)
        # Everything random of the epoch is drawn and sent at once: no transfer, and so no waiting, in a step.
        offsets = torch.randint(2 * CROP_PADDING + 1, (self.num_images, 2), generator=generator).to(
            self.device
        )
        flips = torch.randint(2, (self.num_images,), generator=generator, dtype=torch.bool).to(self.device)
        seeds = _image_seeds(self.num_images, generator)
        numbers = self._steps(order, first_step)  # on the host, for the seeds
        for chosen, own in zip(self._steps(order.to(self.device), first_step), numbers, strict=True):
            images = self.images[chosen]
            if self.augment != "none":
                images = crop_and_flip(images, offsets[chosen], flips[chosen])
            if self.policy is not None:
                # One image at a time, as torchvision draws one operation for everything it is given.
                images = torch.stack(
                    [_seeded(self.policy, x, s) for x, s in zip(images, seeds[own].tolist(), strict=True)]
                )
            yield self.normalize(images), self.targets[chosen]

    def picture(self, index: int) -> Tensor:
        return self.images[index]

    def __iter__(self) -> Iterator[Batch]:
        for chosen in self.own().to(self.device).split(self.batch_size):
            yield self.normalize(self.images[chosen]), self.targets[chosen]


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Pad with ``CROP_PADDING`` black pixels, cut windows of the old size, mirror some.

    Args:
        images: (N, C, H, W).
        offsets: row and column of each window in the padded image, (N, 2), from 0 to 2 * CROP_PADDING.
        flips: which images to mirror left to right, (N,) bool.
    """
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, [CROP_PADDING] * 4)
    windows = padded.unfold(2, height, 1).unfold(
        3, width, 1
    )  # (N, C, rows, columns, H, W), a strided look without copies
    cropped = windows[torch.arange(len(images), device=images.device), :, offsets[:, 0], offsets[:, 1]]
    return torch.where(flips[:, None, None, None], cropped.flip(-1), cropped)


class FileBatches(Batches):
    """Batches of image files that worker processes decode, augment and resize."""

    def __init__(self, files: list[Path], targets: Tensor, image_size: int, *how: Any):
        super().__init__(len(files), *how)
        # An array, as a million Path objects would be copied bit by bit into every worker that counts references to them.
        names = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)
        self.plain = _ImageFiles(names, targets, evaluation_transform(image_size))
        transform = (
            self.plain.transform if self.augment == "none" else TrainingTransform(image_size, self.augment)
        )
        self.augmented = _ImageFiles(names, targets, transform)
        self._steps_to_load: list[list[tuple[int, int]]] = []
        self._loader: DataLoader | None = None
        _may_have_workers.add(self)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        generator = self._generator(epoch)
        order = torch.randperm(self.num_images, generator=generator)
        seeds = _image_seeds(self.num_images, generator)
        steps = [
            list(zip(part.tolist(), seeds[part].tolist(), strict=True))
            for part in self._steps(order, first_step)
        ]
        return self._load(self.augmented, steps)

    def picture(self, index: int) -> Tensor:
        return read_image(self.plain.path(index), self.plain.transform)

    def __iter__(self) -> Iterator[Batch]:
        return self._load(
            self.plain,
            [[(i, 0) for i in part.tolist()] for part in self.own().split(self.batch_size) if len(part)],
        )

    def _load(self, files: "_ImageFiles", steps: list[list[tuple[int, int]]]) -> Iterator[Batch]:
        # The same loader every epoch keeps its processes; it reads the list of steps anew.
        self._steps_to_load[:] = steps
        if self._loader is None or self._loader.dataset is not files:
            self.close()
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message=".*worker processes"
                )  # more than cores were asked for
                self._loader = DataLoader(
                    files,
                    batch_sampler=self._steps_to_load,
                    num_workers=self.workers,
                    collate_fn=_collate,
                    worker_init_fn=_ignore_stopping,
                    generator=torch.Generator(),  # what it draws would else change the state that checkpoints keep
                    pin_memory=self.device.type == "cuda",
                    persistent_workers=self.workers > 0,
                    # Forked, they are this process's own children, and notice when it is killed; a fork server would keep them alive.
                    multiprocessing_context="fork" if self.workers > 0 and sys.platform == "linux" else None,
                )
        for batch in self._loader:
            if isinstance(batch, str):
                raise UserError(f"{batch}; {datasets.WAYS_ON}; a run goes on with --resume")
            images, targets = (part.to(self.device, non_blocking=True) for part in batch)
            yield self.normalize(images), targets

    def close(self) -> None:
        """End the processes that load images."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
        self._loader = None


_may_have_workers: weakref.WeakSet[FileBatches] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Whatever ends a run: Python itself would send them a SIGTERM, which they ignore, and wait for them without end."""
    for batches in list(_may_have_workers):
        batches.close()


class _ImageFiles(Dataset):
    def __init__(self, names: np.ndarray, targets: Tensor, transform: Callable[[Image.Image], Tensor]):
        self.names, self.targets, self.transform = names, targets, transform

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return Path(os.fsdecode(self.names[index]))

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor] | str:
        index, seed = key
        try:
            image = _seeded(lambda path: read_image(path, self.transform), self.path(index), seed)
        except UserError as error:
            return str(error)  # raised by the main process: a worker's exception arrives wrapped in a trace
        return image, self.targets[index]


def _image_seeds(num_images: int, generator: torch.Generator) -> Tensor:
    """Every image of an epoch has a seed of its own, so that its augmentation does not depend on who makes it, or when."""
    return torch.randint(2**62, (num_images,), generator=generator)


def _seeded(transform: Callable[[Any], Tensor], image: Any, seed: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return transform(image)


def _ignore_stopping(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, and a scheduler's SIGTERM often every process of a job; the main process finishes its
    step first, needs its workers for that, and ends them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _collate(samples: list) -> Batch | str:
    for sample in samples:
        if isinstance(sample, str):
            return sample
    images, targets = zip(*samples, strict=True)
    # Stacked as they lie in memory, pixel by pixel.
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2), torch.stack(targets)


class TrainingTransform:
    """Opened image -> bytes (3, image_size, image_size): random resized crop and flip, then the policy that ``augment`` names.

    Only what a crop needs is decoded, and PyTorch resizes bytes faster than PIL does.
    """

    def __init__(self, image_size: int, augment: str = "standard"):
        self.image_size, self.policy = image_size, _augmentation_policy(augment)

    def __call__(self, image: Image.Image) -> Tensor:
        top, left, height, width = transforms.RandomResizedCrop.get_params(image, CROP_AREAS, CROP_RATIOS)
        # A JPEG is decoded at 1/2, 1/4 or 1/8, if then the crop still has enough pixels; other formats come as they are.
        full_width = image.width
        image.draft(
            None, tuple(math.ceil(side * self.image_size / min(height, width)) for side in image.size)
        )
        reduction = round(full_width / image.width)
        top, left, height, width = (n // reduction for n in (top, left, height, width))
        # Turned upright after the crop, whose shape is as likely either way.
        crop = datasets.rgb(image.crop((left, top, left + width, top + height)))
        if torch.backends.cpu.get_cpu_capability() not in (
            "AVX2",
            "AVX512",
        ):  # without these, PIL is twice as fast
            crop = crop.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        crop = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
        crop = v2.functional.resize(crop, [self.image_size] * 2, antialias=True)
        if torch.rand(()) < 0.5:
            crop = crop.flip(-1)
        return crop if self.policy is None else self.policy(crop)


def _augmentation_policy(augment: str) -> v2.Transform | None:
    return {"trivial": v2.TrivialAugmentWide, "randaugment": v2.RandAugment}.get(augment, lambda: None)()


def load_data(
    settings: Settings,
    device: torch.device,
    shard: Shard | None = None,
    stored: DataInfo | None = None,
    split: Split | None = None,
) -> Data:
    """Find, check and split the data set that ``settings`` name. Anytime evaluation needs no training images.

    Args:
        stored, split: what a checkpoint remembers: the classes must be the same, the split is taken over, and training images
            that it does not know are left out.

    Raises:
        UserError: missing or empty folders, unreadable images, classes that differ between the parts, an impossible split, other data
            than the checkpoint's.
    """
    shard, (held_out, names) = shard or Shard(), split or (None, None)
    image_size = settings.image_size or (224 if settings.data in ("imagenet", "folder") else 32)
    in_memory, trains, test_alone = (
        image_size <= LARGEST_IN_MEMORY,
        settings.evalmode is None,
        settings.evalmode in TEST_ALONE,
    )
    has_mean = stored is not None or settings.data in NORMALIZATION or not in_memory
    found = datasets.find(settings, image_size, stored, only_test=test_alone and has_mean)
    known = datasets.recognise(found, stored, names)
    if held_out is None:
        size = 0 if test_alone else settings.val_size
        held_out = datasets.choose_held_out(len(found.train), size, settings.split_seed)
        if settings.val_size is None and not test_alone:
            purpose = "to choose the best epoch and the thresholds"
            found.notes.append(
                f"{HELD_OUT_SHARE} % of the training images are held out {purpose}; --val-size N changes that"
            )
    is_held_out = torch.isin(known, held_out)
    kept = (~is_held_out & (known >= 0)).nonzero().flatten()
    parts = {
        "train": found.train.take(kept),
        "val": found.train.take((is_held_out & (not test_alone)).nonzero().flatten()),
        "test": found.test,
    }
    for name, part in parts.items():
        if (in_memory or settings.skip_unreadable) and (name != "train" or trains or not has_mean):
            parts[name] = datasets.read_files(part, image_size, settings.skip_unreadable, found.notes)
    if trains and len(parts["train"]) < settings.batch_size:
        raise UserError(
            f"--batch-size {settings.batch_size} is more than the {len(parts['train'])} training images without the held-out ones"
        )
    mean, std = (stored.mean, stored.std) if stored else _normalization(settings.data, parts["train"])
    normalize = Normalizer(mean, std, device, settings.channels_last)

    def batches(name: str) -> Batches:
        part, how = parts[name], (settings, settings.augment if name == "train" else "none", normalize, shard)
        if part.images is not None:
            return InMemoryBatches(part.images, part.targets, *how)
        return FileBatches(part.files, part.targets, image_size, *how)

    train, val, test = map(batches, parts)
    if trains and not settings.skip_unreadable:  # the first epoch reads all other images
        for name, indices in (("val", val.own()), ("test", test.own()), ("train", train.left_out(0))):
            datasets.read_files(parts[name].take(indices), image_size, False, found.notes)
    digests = (
        datasets.name_digests(found.names)
        if len(found.names) == len(found.train)
        else torch.empty(0, dtype=torch.int64)
    )
    info = DataInfo(
        settings.data,
        found.class_names,
        image_size,
        1.0 if in_memory else LARGE_CROP_SHARE,
        "bilinear",
        list(mean),
        list(std),
        len(found.train),
        found.fingerprint,
    )
    if stored is not None and stored.knows_training_images:  # what its split refers to
        info = replace(info, num_training_images=stored.num_training_images, fingerprint=stored.fingerprint)
    return Data(
        info,
        Split(held_out, digests if names is None else names),
        found.notes,
        found.sorted_by_name,
        train,
        val,
        test,
    )


def _normalization(name: str, training_part: Part) -> tuple[Sequence[float], Sequence[float]]:
    if name in NORMALIZATION or training_part.images is None:
        return NORMALIZATION.get(name, NORMALIZATION["imagenet"])
    if len(training_part) == 0:
        raise UserError(
            f"--data {name} of small images is normalised by its training images; --data-root must hold train/CLASS/ too"
        )
    pixels = training_part.images.transpose(0, 1).flatten(1).float() / 255
    return [round(x, 4) for x in pixels.mean(1).tolist()], [
        round(max(x, 1e-3), 4) for x in pixels.std(1).tolist()
    ]
