"""The description stored in a network's file: the network, its data set and its training, in plain types.

Example:
    network.description.data.class_names, network.description.data.image_size
    network.description.operations[-1]
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Names in files of the tensors of a ``Split``, in its order; all others are weights. Files have the last two
# where they are not empty.
SPLIT_TENSORS = ("held_out", "names", "test_names", "held_out_pixels")
NUM_REQUIRED_TENSORS = 2


class ImageSpec(NamedTuple):
    """The images that a network expects.

    Attributes:
        image_size: Height and width in pixels.
        crop_share: Share of the shorter side that the central crop of an evaluation image keeps.
        interpolation: Name of the interpolation that resizes images.
        mean: Mean of each of the three channels, for values from 0 to 1.
        std: Standard deviation of each of the three channels, for values from 0 to 1.
    """

    image_size: int
    crop_share: float
    interpolation: str
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class DataInfo:
    """The data set of a network and how its images are prepared, in plain types.

    Attributes:
        name: Value of --data, such as ``cifar100`` or ``folder``.
        class_names: Names in the order of the logits; two classes may have the same name.
        image_size: Height and width in pixels.
        crop_share: Share of the shorter side that the central crop of an evaluation image keeps.
        interpolation: Name of the interpolation that resizes images.
        mean: Mean of each of the three channels, for values from 0 to 1.
        std: Standard deviation of each of the three channels, for values from 0 to 1.
        num_training_images: Number of training images, held-out ones included; 0 if the training images are
            unknown.
        fingerprint: Digest of the names of classes and training images; empty for a converted checkpoint,
            whose class names are those that its user gave.
    """

    name: str
    class_names: list[str]
    image_size: int
    crop_share: float
    interpolation: str
    mean: list[float]
    std: list[float]
    num_training_images: int
    fingerprint: str

    @property
    def image_spec(self) -> ImageSpec:
        """The images that the network expects."""
        return ImageSpec(*(getattr(self, name) for name in ImageSpec._fields))

    @property
    def knows_class_names(self) -> bool:
        """Whether the class names are those of the training, not those given to convert a checkpoint."""
        return self.fingerprint != ""

    @property
    def knows_training_images(self) -> bool:
        """Whether the training images, and so the held-out ones, are known."""
        return self.num_training_images > 0


@dataclass(frozen=True)
class Description:
    """Everything that a file stores about a network beside its tensors, in plain types.

    Attributes:
        network: ``type``, and the options of its constructor.
        data: Data set of the network: class names and preprocessing.
        operations: Operations to each exit, per image.
        stage: ``GE`` or ``IMTA``.
        title: Title of its curves.
        recipe: Settings it was trained with.
        seed: Seed of initialisation, order and augmentation; None if unknown.
        commit: Commit of the code; None outside a git clone.
        epoch: Completed training epochs.
        accuracy: Accuracy of every exit in percent: ``val_acc1`` on held-out images, ``test_acc1`` and more
            where it was measured.
        origin: File that training started from.
        frozen_digest: Digest of what stage 2 must not change.
        training: ``hardware`` and ``minutes`` of a shipped network's training.
        thresholds: Thresholds of a shipped network for ``ExitNetwork.early_exit``, by the percentage of all
            operations that they spend at most, as a mean over held-out images: ``"25"``, ``"50"``, ``"75"``.
        held_out_are_new: Whether the held-out images are known to be new to the network, so that promises can
            be tested on them. False where it started from weights that they may have trained.
        split_is_complete: Whether the ``Split`` of its file lists all images that trained it, those of the
            networks that it started from included.
    """

    network: dict[str, Any]
    data: DataInfo
    operations: list[int]
    stage: str
    title: str
    recipe: dict[str, Any]
    seed: int | None
    commit: str | None
    epoch: int = 0
    accuracy: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    origin: str | None = None
    frozen_digest: str | None = None
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    thresholds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    held_out_are_new: bool = True
    split_is_complete: bool = True

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Description":
        """Return the description that ``dataclasses.asdict`` turned into plain types."""
        # Older files do not say what their origin was trained on. Stage 2 takes the images of stage 1.
        is_fine_tuned = values["stage"] == "GE" and values.get("origin") is not None
        values = {"split_is_complete": not is_fine_tuned, **values}
        return cls(**{**values, "data": DataInfo(**values["data"])})


class Split(NamedTuple):
    """The training images a network learned from, and those it did not.

    Attributes:
        held_out: Sorted indices of the images that were held out, (N,) int64.
        name_digests: Digests of the names of all training images, (M,) int64, by which files that came or
            went are told apart; empty for an archive.
        test_digests: Digests of the names of the test images, (T,) int64, where they were split off.
        pixel_digests: Digests of the pixels of the held-out images, (N,) int64, by which those of a shipped
            network are found in another copy of CIFAR.
    """

    held_out: Tensor
    name_digests: Tensor
    test_digests: Tensor = torch.empty(0, dtype=torch.int64)
    pixel_digests: Tensor = torch.empty(0, dtype=torch.int64)

    @property
    def training_digests(self) -> Tensor:
        """Digests of the names of the images that were not held out; empty for an archive."""
        is_held_out = torch.isin(torch.arange(len(self.name_digests)), self.held_out)
        return self.name_digests[~is_held_out]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names in files."""
        named = zip(SPLIT_TENSORS, self, strict=True)
        return {name: x for i, (name, x) in enumerate(named) if i < NUM_REQUIRED_TENSORS or len(x)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Split":
        """Return the split that ``to_tensors`` turned into tensors, among others.

        Raises:
            KeyError: One of the first two is missing.
        """
        required, optional = SPLIT_TENSORS[:NUM_REQUIRED_TENSORS], SPLIT_TENSORS[NUM_REQUIRED_TENSORS:]
        empty = torch.empty(0, dtype=torch.int64)
        return cls(*(tensors[name] for name in required), *(tensors.get(name, empty) for name in optional))

    @classmethod
    def unknown(cls) -> "Split":
        """Return the split of a network whose training images are unknown."""
        return cls(*(torch.empty(0, dtype=torch.int64) for _ in cls._fields))
