"""Which images are training images, held-out images and test images."""

from collections import Counter
from enum import IntEnum

import torch
from torch import Tensor

from image_data.subsets import DataSet, Subset, name_digests, pixel_digests
from models.description import DataInfo, Split
from utils import UserError, listed

HELD_OUT_SHARE = 10  # percent of a folder's training images, where --val-size does not say
MAX_GONE = 10  # percent of a checkpoint's training images; with more missing, the data are others


class Role(IntEnum):
    """Role of an image in the training of the network to start from."""

    UNKNOWN = 0  # test images and new ones
    HELD_OUT = 1
    TRAINED = 2


def roles_in(origin: Split, digests: Tensor) -> Tensor:
    """Return the ``Role`` (N,) that images with these ``name_digests`` (N,) had in the split of a network."""
    roles = torch.full(digests.shape, int(Role.UNKNOWN))
    roles[torch.isin(digests, origin.name_digests)] = Role.HELD_OUT
    roles[torch.isin(digests, origin.training_digests)] = Role.TRAINED
    return roles


def choose_held_out(
    targets: Tensor, val_size: int | None, split_seed: int, roles: Tensor | None = None
) -> Tensor:
    """Choose training images to hold out.

    They are drawn from all images alike. Where that would take all images of a class, one of them stays, and
    an image of another class is held out in its place.

    Args:
        targets: Targets (N,) of all training images.
        val_size: Number of images to hold out. If None, ``HELD_OUT_SHARE`` percent.
        split_seed: Seed of the draw.
        roles: The ``Role`` (N,) of the images for the network to start from. If it held out half of the
            number or more, these stay held out, with a share of the unknown images.

    Returns:
        Sorted indices.

    Raises:
        UserError: Fewer than one image would be left to train on.
    """
    count = len(targets)
    size = max(1, count * HELD_OUT_SHARE // 100) if val_size is None else val_size
    if size >= count > 0:
        raise UserError(
            f"{size} images are to be held out, but there are only {count} training images; "
            "give a smaller --val-size"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(split_seed))
    if roles is not None:
        order = _held_out_first(order, roles, size)
    is_held_out = torch.zeros(count, dtype=torch.bool)
    is_held_out[order[:size]] = True
    _leave_one_of_each_class(targets, order, is_held_out)
    return is_held_out.nonzero().flatten()


def _held_out_first(order: Tensor, roles: Tensor, size: int) -> Tensor:
    """Return the order in which ``size`` images are held out, if a network held out enough of them."""
    unknown, held_out, trained = (order[roles[order] == role] for role in Role)
    if 2 * len(held_out) < size:
        return order
    num_unknown = size * len(unknown) // len(order)
    num_held_out = size - num_unknown
    parts = (held_out[:num_held_out], unknown[:num_unknown], held_out[num_held_out:], unknown[num_unknown:])
    return torch.cat([*parts, trained])


def _leave_one_of_each_class(targets: Tensor, order: Tensor, is_held_out: Tensor) -> None:
    """Exchange images, so that no class loses all its training images while another has some to spare."""
    left = torch.bincount(targets[~is_held_out], minlength=int(targets.max()) + 1 if len(targets) else 0)
    emptied = order[is_held_out[order] & (left[targets[order]] == 0)].tolist()
    if not emptied:
        return
    spare = iter(order[~is_held_out[order] & (left[targets[order]] > 1)].tolist())
    for index in emptied:
        if left[targets[index]] > 0:  # another one of its class has come back
            continue
        substitute = next((i for i in spare if left[targets[i]] > 1), None)
        if substitute is None:
            return
        is_held_out[index], is_held_out[substitute] = False, True
        left[targets[index]] += 1
        left[targets[substitute]] -= 1


def choose_test(targets: Tensor, test_size: float, split_seed: int, roles: Tensor | None = None) -> Tensor:
    """Choose test images, as equal a share of every class as whole numbers allow.

    Args:
        targets: Targets (N,) of all images.
        test_size: A share below 1, or a number of images.
        split_seed: Seed of the draw.
        roles: The ``Role`` (N,) of the images for the network to start from. In every class, those that are
            unknown to it are chosen first, those that trained it last.

    Returns:
        True for every test image, bool (N,). Every class with at least two images keeps one and gives one.

    Raises:
        UserError: There are fewer images.
    """
    count = len(targets)
    size = round(count * test_size) if test_size < 1 else int(test_size)
    if size >= count:
        raise UserError(f"--test-size {size} takes all of the {count} images; it must be smaller")
    per_class = torch.bincount(targets)
    wanted = per_class * size / count
    chosen = wanted.floor().long()
    most_missing = (wanted - chosen).argsort(descending=True, stable=True)
    chosen[most_missing[: size - int(chosen.sum())]] += 1
    chosen = torch.minimum(chosen.clamp(min=1), (per_class - 1).clamp(min=0))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(split_seed))
    if roles is not None:
        order = order[roles[order].argsort(stable=True)]
    is_test = torch.zeros(count, dtype=torch.bool)
    for label, number in enumerate(chosen.tolist()):
        is_test[order[targets[order] == label][:number]] = True
    return is_test


def match_training_images(data_set: DataSet, stored: DataInfo | None, split: Split | None) -> Tensor:
    """Find the training images that a checkpoint knows.

    Images may have been removed or added since. Known images keep their place in the split; unknown ones are
    in no subset of it.

    Args:
        data_set: The data set that was found.
        stored: The checkpoint's ``DataInfo``. If None, there is no checkpoint, and the images are numbered
            as they are.
        split: The checkpoint's split; without digests in it, all images must be there.

    Returns:
        The number of every training image among those of the checkpoint, -1 for an unknown one.

    Raises:
        UserError: The classes differ, or too many images are missing.
    """
    count = len(data_set.train)
    if stored is not None:
        _refuse_other_classes(stored, data_set.class_names)
    if stored is None or count == 0 or not stored.knows_training_images:
        return torch.arange(count)
    if (count, data_set.fingerprint) == (stored.num_training_images, stored.fingerprint):
        return torch.arange(count)
    if split is not None and len(split.pixel_digests) and count == stored.num_training_images:
        numbers = _numbers_by_pixels(data_set.train, split)
        if numbers is not None:
            return numbers
    digests = [] if split is None else split.name_digests.tolist()
    if len(digests) == stored.num_training_images and len(data_set.names) == count:
        known = {digest: i for i, digest in enumerate(digests)}
        numbers = torch.tensor([known.get(digest, -1) for digest in name_digests(data_set.names).tolist()])
        new = int((numbers < 0).sum())
        gone = stored.num_training_images - (count - new)
        if 100 * gone <= MAX_GONE * stored.num_training_images:
            data_set.notes.append(
                f"of the checkpoint's training images {gone:,} have gone; {new:,} new ones are left out"
            )
            return numbers
    others = " others" if count == stored.num_training_images else ""
    raise UserError(
        "the data are not those of the checkpoint: "
        f"it knows {stored.num_training_images} training images of {stored.name}, these are {count}{others}; "
        "its held-out split would mix with training images"
    )


def _numbers_by_pixels(subset: Subset, split: Split) -> Tensor | None:
    """Return numbers for the images of another copy of a data set, so that the same ones are held out.

    Returns:
        Numbers (N,); None for files, and where an image that was held out is missing.
    """
    if subset.images is None:
        return None
    missing = Counter(split.pixel_digests.tolist())  # images may be there twice
    is_held_out = torch.zeros(len(subset), dtype=torch.bool)
    for i, digest in enumerate(pixel_digests(subset.images).tolist()):
        if missing[digest]:
            is_held_out[i] = True
            missing[digest] -= 1
    if missing.total():
        return None
    was_held_out = torch.zeros(len(subset), dtype=torch.bool)
    was_held_out[split.held_out] = True
    numbers = torch.empty(len(subset), dtype=torch.int64)
    numbers[is_held_out], numbers[~is_held_out] = split.held_out, (~was_held_out).nonzero().flatten()
    return numbers


def _refuse_other_classes(info: DataInfo, found: list[str]) -> None:
    stored = info.class_names
    # A released network does not know the names of its classes.
    if stored == found or (not info.knows_class_names and len(stored) == len(found)):
        return
    here, there = ([name for name in a if name not in set(b)] for a, b in ((found, stored), (stored, found)))
    raise UserError(
        f"the checkpoint has {len(stored)} classes ({listed(stored)}), "
        f"the data have {len(found)} ({listed(found)})"
        + (f"; only the checkpoint has {listed(there)}" if there else "")
        + (f"; only the data have {listed(here)}" if here else "")
    )
