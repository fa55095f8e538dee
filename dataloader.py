"""Images of every data set, as batches of normalised float tensors on the training device.

    data = load_data(settings, device)
    for images, targets in data.train.epoch(0): ...   # (N, 3, H, W), (N,)
    for images, targets in data.test: ...

Small images live on the device as bytes, and a whole batch is cropped and flipped there at once; large ones are decoded by worker
processes. Order and augmentation are functions of (seed, epoch, step) alone, so a run can go on from any step, on any number of workers.
"""

import argparse
import fcntl
import hashlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

import synthetic
from utils import UserError

Batch = tuple[Tensor, Tensor]

LARGEST_IN_MEMORY = 64  # pixels; larger images stay files
CROP_PADDING = 4
LARGEST_SIDES_RATIO = 200  # of an image; resizing the shorter side would make the longer one enormous
CROP_AREAS, CROP_RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)  # of random resized crops: share of the image, width by height

DEMO_IMAGES = {"train": 6500, "test": 2000}
DEMO_SEEDS = {"train": 1, "test": 2}

NORMALIZATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class DataInfo:
    """What a checkpoint remembers of its data set, in plain types."""

    name: str
    class_names: list[str]
    image_size: int
    mean: list[float]
    std: list[float]
    num_training_images: int
    fingerprint: str


@dataclass(frozen=True)
class Data:
    """The three parts of a data set. ``held_out`` are the indices of ``val`` among the training images, int64, sorted."""

    info: DataInfo
    held_out: Tensor
    train: "Batches"
    val: "Batches"
    test: "Batches"


@dataclass(frozen=True)
class Shard:
    """Part ``rank`` of ``world_size`` processes that share every batch."""

    rank: int = 0
    world_size: int = 1


class Batches:
    """Batches of one part of a data set. ``batch_size`` counts the images over all processes.

    ``epoch(e)`` shuffles, augments and leaves out the last incomplete batch; iterating gives this process's images once, in order.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, shard: Shard):
        if batch_size % shard.world_size:
            raise UserError(f"--batch-size {batch_size} cannot be shared by {shard.world_size} processes; use a multiple")
        self.num_images, self.batch_size, self.seed, self.shard = num_images, batch_size, seed, shard

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

    @property
    def num_own(self) -> int:
        """Images this process evaluates."""
        return len(self._own())

    def _own(self) -> Tensor:
        """Indices of the images this process evaluates."""
        return torch.arange(self.shard.rank, self.num_images, self.shard.world_size)

    def picture(self, index: int) -> Tensor:
        """One image as the network sees it in evaluation, before normalisation: bytes (3, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} must give images")

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        raise NotImplementedError(f"{type(self).__name__} must give batches")

    def __iter__(self) -> Iterator[Batch]:
        raise NotImplementedError(f"{type(self).__name__} must give batches")


class Normalizer:
    """Bytes (N, 3, H, W) -> floats, each channel by its mean and standard deviation over the data set (of values 0 to 1)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, channels_last: bool = False):
        self.scale = (1 / (255 * torch.tensor(std))).reshape(1, 3, 1, 1).to(device)
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).reshape(1, 3, 1, 1).to(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.to(torch.float32, memory_format=self.memory_format), self.scale)


class InMemoryBatches(Batches):
    """Batches of small images, (N, 3, H, W) bytes that live on ``device``."""

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        normalize: Normalizer,
        batch_size: int,
        augment: str,
        seed: int,
        shard: Shard,
        device: torch.device,
    ):
        super().__init__(len(images), batch_size, seed, shard)
        self.images, self.targets = images.to(device), targets.to(device)
        self.normalize, self.device = normalize, device
        self.crops, self.policy = augment != "none", _augmentation_policy(augment)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        generator = self._generator(epoch)
        order = torch.randperm(self.num_images, generator=generator)
        # Everything random of the epoch is drawn and sent at once: no transfer, and so no waiting, in a step.
        offsets = torch.randint(2 * CROP_PADDING + 1, (self.num_images, 2), generator=generator).to(self.device)
        flips = torch.randint(2, (self.num_images,), generator=generator, dtype=torch.bool).to(self.device)
        seeds = _image_seeds(self.num_images, generator)
        numbers = self._steps(order, first_step)  # on the host, for the seeds
        for chosen, own in zip(self._steps(order.to(self.device), first_step), numbers, strict=True):
            images = self.images[chosen]
            if self.crops:
                images = crop_and_flip(images, offsets[chosen], flips[chosen])
            if self.policy is not None:
                # One image at a time, as torchvision draws one operation for everything it is given.
                images = torch.stack([_seeded(self.policy, x, s) for x, s in zip(images, seeds[own].tolist(), strict=True)])
            yield self.normalize(images), self.targets[chosen]

    def picture(self, index: int) -> Tensor:
        return self.images[index]

    def __iter__(self) -> Iterator[Batch]:
        for chosen in self._own().to(self.device).split(self.batch_size):
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
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, rows, columns, H, W), a strided look without copies
    cropped = windows[torch.arange(len(images), device=images.device), :, offsets[:, 0], offsets[:, 1]]
    return torch.where(flips[:, None, None, None], cropped.flip(-1), cropped)


class FileBatches(Batches):
    """Batches of image files that worker processes decode, augment and resize."""

    def __init__(
        self,
        files: list[Path],
        targets: Tensor,
        normalize: Normalizer,
        image_size: int,
        batch_size: int,
        augment: str,
        seed: int,
        shard: Shard,
        device: torch.device,
        workers: int,
    ):
        super().__init__(len(files), batch_size, seed, shard)
        self.normalize, self.device, self.workers = normalize, device, workers
        # An array, as a million Path objects would be copied bit by bit into every worker that counts references to them.
        names = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)
        self.plain = _ImageFiles(names, targets, evaluation_transform(image_size))
        self.augmented = self.plain if augment == "none" else _ImageFiles(names, targets, TrainingTransform(image_size, augment))
        self._steps_to_load: list[list[tuple[int, int]]] = []
        self._loader: DataLoader | None = None

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        generator = self._generator(epoch)
        order = torch.randperm(self.num_images, generator=generator)
        seeds = _image_seeds(self.num_images, generator)
        steps = [list(zip(part.tolist(), seeds[part].tolist(), strict=True)) for part in self._steps(order, first_step)]
        return self._load(self.augmented, steps)

    def picture(self, index: int) -> Tensor:
        return read_image(self.plain.path(index), self.plain.transform)

    def __iter__(self) -> Iterator[Batch]:
        return self._load(self.plain, [[(i, 0) for i in part.tolist()] for part in self._own().split(self.batch_size) if len(part)])

    def _load(self, files: "_ImageFiles", steps: list[list[tuple[int, int]]]) -> Iterator[Batch]:
        # The same loader every epoch keeps its processes; it reads the list of steps anew.
        self._steps_to_load[:] = steps
        if self._loader is None or self._loader.dataset is not files:
            self._loader = DataLoader(
                files,
                batch_sampler=self._steps_to_load,
                num_workers=self.workers,
                collate_fn=_collate,
                worker_init_fn=_ignore_stopping,
                pin_memory=self.device.type == "cuda",
                persistent_workers=self.workers > 0,
                # Forked, they are this process's own children, and notice when it is killed; a fork server would keep them alive for ever.
                multiprocessing_context="fork" if self.workers > 0 and sys.platform == "linux" else None,
            )
        for batch in self._loader:
            if isinstance(batch, str):
                raise UserError(batch)
            images, targets = (part.to(self.device, non_blocking=True) for part in batch)
            yield self.normalize(images), targets


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

    Only what a crop needs is decoded, and PyTorch resizes bytes faster than PIL does (``benchmarks/image_decoding.py``).
    """

    def __init__(self, image_size: int, augment: str = "standard"):
        self.image_size, self.policy = image_size, _augmentation_policy(augment)

    def __call__(self, image: Image.Image) -> Tensor:
        top, left, height, width = transforms.RandomResizedCrop.get_params(image, CROP_AREAS, CROP_RATIOS)
        # Of a JPEG; other formats come as they are.
        wanted = decoded_fraction(height, width, self.image_size)
        full_width = image.width
        image.draft(None, tuple(side // wanted for side in image.size))
        reduction = round(full_width / image.width)
        top, left, height, width = (n // reduction for n in (top, left, height, width))
        crop = _rgb(image.crop((left, top, left + width, top + height)))
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):  # without these, PIL is twice as fast
            crop = crop.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        crop = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
        crop = v2.functional.resize(crop, [self.image_size] * 2, antialias=True)
        if torch.rand(()) < 0.5:
            crop = crop.flip(-1)
        return crop if self.policy is None else self.policy(crop)


def decoded_fraction(height: int, width: int, size: int) -> int:
    """The n = 1, 2, 4 or 8 for which a crop (height, width) decoded at a 1/n of its size still has ``size`` pixels a side.

    Decoders have fast code for powers of two alone."""
    return next((n for n in (8, 4, 2) if min(height, width) >= n * size), 1)


def _augmentation_policy(augment: str) -> v2.Transform | None:
    return {"trivial": v2.TrivialAugmentWide, "randaugment": v2.RandAugment}.get(augment, lambda: None)()


def evaluation_transform(image_size: int) -> v2.Transform:
    """Opened image -> bytes (3, image_size, image_size): the central square, of 7/8 of the shorter side for large images."""
    resized = image_size if image_size <= LARGEST_IN_MEMORY else round(image_size * 8 / 7)
    return v2.Compose([_rgb, v2.Resize(resized, antialias=True), v2.CenterCrop(image_size), v2.PILToTensor()])


def read_image(path: Path, transform: Callable[[Image.Image], Any] | None = None) -> Any:
    """What ``transform`` makes of an image file that was opened and not decoded yet; None: the image in RGB.

    Raises:
        UserError: it cannot be read, or is so large that it looks like a decompression bomb; the file is named.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if not path.is_file():  # opening a pipe would wait for ever
                raise OSError("there is no such file")
            with Image.open(path) as image:
                if max(image.size) > LARGEST_SIDES_RATIO * min(image.size):
                    raise ValueError(f"its sides of {image.width} and {image.height} pixels differ too much")
                return (transform or _rgb)(image)
    except Exception as error:  # what a decoder raises on damaged bytes depends on the format
        raise UserError(f"cannot read the image {path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


@dataclass(frozen=True)
class _Part:
    """One part as found: small images as bytes (N, 3, H, W), or files."""

    targets: Tensor
    images: Tensor | None = None
    files: list[Path] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Tensor) -> "_Part":
        if len(indices) == len(self):  # sorted, and so all of them: no copy
            return self
        return _Part(
            self.targets[indices],
            None if self.images is None else self.images[indices],
            None if self.files is None else [self.files[i] for i in indices.tolist()],
        )


def load_data(
    settings: argparse.Namespace,
    device: torch.device,
    shard: Shard | None = None,
    stored: DataInfo | None = None,
    held_out: Tensor | None = None,
) -> Data:
    """Find, check and split the data set that ``settings`` name. Anytime evaluation needs no training images.

    Args:
        stored, held_out: what a checkpoint remembers: the data must be the same, and the split is taken over.

    Raises:
        UserError: missing or empty folders, unreadable images, classes that differ between the parts, an impossible split, other data
            than the checkpoint's.
    """
    shard = shard or Shard()
    image_size = settings.image_size or (224 if settings.data in ("imagenet", "folder") else 32)
    in_memory = image_size <= LARGEST_IN_MEMORY
    train, test, class_names, names = _find(settings, image_size, in_memory)
    fingerprint = hashlib.sha256("\n".join([settings.data, *class_names, *names]).encode()).hexdigest()[:16]
    if stored is not None:
        _check_same(stored, class_names, len(train), fingerprint)
    if len(train) == 0:
        held_out = torch.empty(0, dtype=torch.int64)
    elif held_out is None:
        held_out = choose_held_out(len(train), settings.val_size, settings.split_seed)
    kept = torch.ones(len(train), dtype=torch.bool)
    kept[held_out] = False
    kept = _limited(kept.nonzero().flatten(), settings.limit_train, settings.split_seed)
    if len(kept) < settings.batch_size and settings.evalmode is None:
        raise UserError(f"--batch-size {settings.batch_size} is more than the {len(kept)} training images left after the held-out split")
    tested = _limited(torch.arange(len(test)), settings.limit_test, settings.split_seed)
    training_part = train.take(kept)
    mean, std = (stored.mean, stored.std) if stored else _normalization(settings.data, training_part)
    normalize = Normalizer(mean, std, device, settings.channels_last)

    def batches(part: _Part, augment: str) -> Batches:
        shared = {"batch_size": settings.batch_size, "augment": augment, "seed": settings.seed, "shard": shard, "device": device}
        if part.images is not None:
            return InMemoryBatches(part.images, part.targets, normalize, **shared)
        return FileBatches(part.files, part.targets, normalize, image_size, workers=settings.workers, **shared)

    return Data(
        DataInfo(settings.data, class_names, image_size, list(mean), list(std), len(train), fingerprint),
        held_out,
        batches(training_part, settings.augment),
        batches(train.take(held_out), "none"),
        batches(test.take(tested), "none"),
    )


def choose_held_out(num_images: int, val_size: int, split_seed: int) -> Tensor:
    """Sorted indices of ``val_size`` of ``num_images`` training images.

    Raises:
        UserError: fewer than one image would be left to train on.
    """
    if val_size >= num_images:
        raise UserError(f"--val-size {val_size} holds out all of the {num_images} training images; it must be smaller")
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(split_seed))[:val_size].sort().values


def _limited(indices: Tensor, limit: int | None, split_seed: int) -> Tensor:
    if limit is None or limit >= len(indices):
        return indices
    chosen = torch.randperm(len(indices), generator=torch.Generator().manual_seed(split_seed + 1))[:limit]
    return indices[chosen.sort().values]


def _check_same(stored: DataInfo, class_names: list[str], num_images: int, fingerprint: str) -> None:
    if class_names != stored.class_names:
        raise UserError(f"the checkpoint was trained on {len(stored.class_names)} classes, the data have {len(class_names)} or other names")
    if num_images and (num_images, fingerprint) != (stored.num_training_images, stored.fingerprint):
        raise UserError(
            f"the data are not those of the checkpoint: it knows {stored.num_training_images} training images of {stored.name}, "
            f"these are {num_images}, or others; its held-out split would mix with training images"
        )


def _normalization(name: str, training_part: _Part) -> tuple[list[float], list[float]]:
    if name in NORMALIZATION:
        return tuple(list(numbers) for numbers in NORMALIZATION[name])
    if training_part.images is None:
        return tuple(list(numbers) for numbers in NORMALIZATION["imagenet"])
    if len(training_part) == 0:
        raise UserError(f"--data {name} of small images is normalised by its training images; --data-root must hold train/CLASS/ too")
    pixels = training_part.images.transpose(0, 1).flatten(1).float() / 255
    return [round(x, 4) for x in pixels.mean(1).tolist()], [round(max(x, 1e-3), 4) for x in pixels.std(1).tolist()]


def _find(settings: argparse.Namespace, image_size: int, in_memory: bool) -> tuple[_Part, _Part, list[str], list[str]]:
    """Training part, test part, class names, and the training images' names (or a digest of their pixels)."""
    if settings.data == "demo":
        train, test = (_demo_part(part, image_size) for part in ("train", "test"))
        return train, test, list(synthetic.CLASS_NAMES), [_digest(train.images)]
    root = settings.data_root
    train_folder = root / "train"
    test_folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train_folder.is_dir() and test_folder is not None and settings.evalmode == "anytime":
        test_files, class_names = _list_folder(test_folder)
        test = _file_part(test_files, image_size, in_memory)
        return test.take(torch.empty(0, dtype=torch.int64)), test, class_names, []
    if not train_folder.is_dir() and settings.data in ("cifar10", "cifar100"):
        return cifar_archive(settings.data, root, image_size)
    if not train_folder.is_dir() or test_folder is None:
        raise UserError(f"--data-root {root} must hold the folders train/CLASS/ and test/CLASS/ (or val/CLASS/) with images")
    (train_files, class_names), (test_files, test_classes) = _list_folder(train_folder), _list_folder(test_folder)
    if class_names != test_classes:
        only_one = sorted(set(class_names) ^ set(test_classes))
        raise UserError(f"{train_folder} and {test_folder} must have the same classes; only one of them has: {', '.join(only_one[:5])}")
    names = [str(path.relative_to(train_folder)) for path, _ in train_files]
    train, test = (_file_part(files, image_size, in_memory) for files in (train_files, test_files))
    return train, test, class_names, names


def _demo_part(part: str, image_size: int) -> _Part:
    try:
        images, targets = synthetic.generate(DEMO_IMAGES[part], DEMO_SEEDS[part], image_size)
    except ValueError as error:
        raise UserError(f"--image-size: {error}") from None
    return _Part(targets, images)


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.numpy()).hexdigest()


def cifar_archive(name: str, root: Path, image_size: int) -> tuple[_Part, _Part, list[str], list[str]]:
    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if image_size != 32:
        raise UserError(f"--image-size {image_size} is not that of {name}, 32")
    is_new = not root.exists()
    try:
        with _one_process_at_a_time(root):
            train, test = (reader(root, train=is_train, download=True) for is_train in (True, False))
    except (OSError, RuntimeError) as error:
        if is_new and root.is_dir() and not any(root.iterdir()):  # made by the attempt to download
            root.rmdir()
        raise UserError(
            f"no {name} in --data-root {root}, and no download ({str(error).splitlines()[0]}); "
            f"put torchvision's archive or the folders train/CLASS/ and test/CLASS/ there"
        ) from None
    parts = [_Part(torch.tensor(d.targets), torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous()) for d in (train, test)]
    return *parts, list(train.classes), [_digest(parts[0].images)]


@contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Of the processes torchrun started on this machine one downloads, the others then find the files."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _list_folder(folder: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    try:
        found = datasets.ImageFolder(folder, allow_empty=True)
    except (FileNotFoundError, OSError) as error:
        raise UserError(f"{folder} must hold one folder of images a class: {error}") from None
    empty = set(range(len(found.classes))) - set(found.targets)
    if empty:
        raise UserError(f"{folder / found.classes[min(empty)]} holds no image (a file ending with one of {' '.join(IMG_EXTENSIONS)})")
    return [(Path(path), target) for path, target in found.samples], found.classes


def _file_part(files: list[tuple[Path, int]], image_size: int, in_memory: bool) -> _Part:
    paths = [path for path, _ in files]
    targets = torch.tensor([target for _, target in files])
    if not in_memory:
        return _Part(targets, files=paths)
    transform = evaluation_transform(image_size)

    def pixels(path: Path) -> np.ndarray:
        image = read_image(path)
        return np.asarray(image).transpose(2, 0, 1) if image.size == (image_size, image_size) else transform(image).numpy()

    with ThreadPoolExecutor() as pool:
        try:
            images = np.stack(list(pool.map(pixels, paths)))
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    return _Part(targets, torch.from_numpy(images))
