"""The images of a run: of its settings, or of the network to start from."""

import hashlib
from argparse import Namespace

import torch

from dataloader import Data, load_data
from engine.checkpoint import LoadedNetwork
from engine.runtime.distributed import Processes
from engine.runtime.log import Log
from engine.session import Session
from image_data.batches import InMemoryBatches
from image_data.subsets import pixel_digests
from models import ExitNetwork
from models.description import DataInfo, ImageSpec, Split
from utils import UserError


def data_for_new_run(
    session: Session, origin: LoadedNetwork | None, image_spec: ImageSpec | None, may_change: bool
) -> Data:
    """Read the images of a new run. Those held out are new to the network to start from where possible.

    Args:
        session: The run.
        origin: The network to start from, None to start from scratch.
        image_spec: The images that the network to train expects, None if it takes any.
        may_change: Whether the data set may be another than that of ``origin``.
    """
    if origin is None:
        return load_run_data(session, image_spec=image_spec)
    if may_change:
        # Only what was read says whether it is the data set of ``origin``; then it is read again, with the
        # same images held out.
        data = load_run_data(session, image_spec=image_spec, origin_split=origin.known_split)
        is_same = data.info.fingerprint == origin.data.fingerprint
        if is_same and torch.equal(data.split.held_out, origin.split.held_out):
            return data
        if not is_same and not _is_another_copy(data, origin):
            return data
        size = len(origin.split.held_out)
        session.log.line(f"the images are those of {origin.path}: the same {size:,} of them are held out")
    data = load_run_data(session, origin.data, origin.known_split, image_spec)
    log_class_order(origin, data, session.log)
    return data


def _is_another_copy(data: Data, origin: LoadedNetwork) -> bool:
    """Return True if the images are those of ``origin``, as far as it knows their pixels."""
    known = origin.split.pixel_digests
    names = [(info.name, info.class_names, info.num_training_images) for info in (data.info, origin.data)]
    parts = [part for part in (data.train, data.val) if isinstance(part, InMemoryBatches)]
    # Files are compared by their names, which ``held_out_are_new`` does.
    if not len(known) or names[0] != names[1] or not parts or len(data.split.name_digests):
        return False
    found = torch.cat([pixel_digests(part.images.cpu()) for part in parts])
    return bool(torch.isin(known, found).all())


def load_run_data(
    session: Session,
    stored: DataInfo | None = None,
    split: Split | None = None,
    image_spec: ImageSpec | None = None,
    origin_split: Split | None = None,
) -> Data:
    """Read the images that the settings name; for the other arguments see ``load_data``."""
    settings, processes = session.settings, session.processes
    which = "" if settings.data == "folder" else f" of {settings.data}"
    where = "" if settings.data == "demo" else f" in {settings.data_root}"
    session.log.line(f"reading the images{which}{where}")
    data = load_data(settings, processes.device, processes.shard, stored, split, image_spec, origin_split)
    _check_same_images(processes, data)
    return data


def _check_same_images(processes: Processes, data: Data) -> None:
    """Raise UserError if the processes found different images, by names, numbers and classes.

    Each would hold out others.
    """
    if processes.world_size == 1:
        return
    counts = [batches.num_images for batches in (data.train, data.val, data.test)]
    digest = hashlib.sha256(f"{data.info.fingerprint} {counts}".encode())
    digest.update(data.split.held_out.numpy().tobytes())
    for batches in (data.train, data.val, data.test):
        digest.update(torch.as_tensor(batches.targets).cpu().numpy().tobytes())
    number = int.from_bytes(digest.digest()[:7], "little")
    if not processes.all_equal(number):
        raise UserError(
            "the processes of this run find different images: --data-root must hold the same ones on all "
            "machines"
        )


def held_out_are_new(
    settings: Namespace, origin: LoadedNetwork | None, data: Data, network: ExitNetwork
) -> bool:
    """Return True if the held-out images of a new run count as new to the weights it starts from.

    Images are compared by the names of their files, those of a data set without files by its fingerprint.

    - With the images of the origin, the same images are held out, and what is known of them stays true.
    - With a folder that shares images with the origin's, held-out images must not have trained the origin.
    - Other images count as new, also to weights of a library whose classes are others. Where images cannot be
      compared, data sets with a class of the same name are taken for the same.
    - If images that its split does not list trained the origin, only images that it lists are known.

    Args:
        settings: The settings of the run.
        origin: The network to start from, None for weights of a library and to start from scratch.
        data: The images of the run.
        network: The network to train.
    """
    if origin is None:
        # A classifier that comes with weights was trained on these classes, perhaps on these images.
        return settings.pretrained is None or (
            network.stage_1.has_new_classifier and data.info.name != "imagenet"
        )
    is_complete = origin.description.split_is_complete
    shares_classes = not set(data.info.class_names).isdisjoint(origin.data.class_names)
    is_other_data = is_complete and data.info.name != origin.data.name and not shares_classes
    if origin.known_split is None:
        return is_other_data
    if data.info.fingerprint == origin.data.fingerprint:
        return origin.description.held_out_are_new
    digests, known = data.split.name_digests, origin.split.name_digests
    if not len(digests) or not len(known):  # an archive, or a shipped network
        return is_other_data
    if not torch.isin(digests, known).any():
        return is_complete
    held_out = digests[data.split.held_out]
    trained = torch.isin(held_out, origin.split.training_digests)
    are_known = is_complete or torch.isin(held_out, known).all().item()
    return origin.description.held_out_are_new and are_known and not trained.any()


def split_is_complete(origin: LoadedNetwork | None, data: Data) -> bool:
    """Return True if the split of a new run lists all images that trained the network to start from.

    Images that trained weights of a library do not count.
    """
    if origin is None:
        return True
    known = origin.split.name_digests
    lists_known = len(known) > 0 and torch.isin(known, data.split.name_digests).all().item()
    is_same = data.info.fingerprint == origin.data.fingerprint
    return origin.description.split_is_complete and (is_same or lists_known)


def log_class_order(saved: LoadedNetwork, data: Data, log: Log) -> None:
    """Say in which order the classes are if their names differ from the network's file."""
    if data.info.class_names != saved.data.class_names:
        names = ", ".join(data.info.class_names[:3])
        log.line(
            f"{saved.path} is a converted checkpoint with other class names: "
            f"its classes are taken in the order of the folders' names ({names}, ...)"
        )
