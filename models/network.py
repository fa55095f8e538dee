"""The one interface of networks with exits: ``MSDNet``, ``Backbone``, ``IMTA`` on either, folded copies.

Training, prediction, operation counts, files and export use only these attributes and methods, and those of
``nn.Module``. Only train_IMTA.py, the command line (``args``, ``settings``), ``models.released``,
``engine.convert`` and ``engine.networks`` know more of ``IMTA``, ``MSDNet`` and ``Backbone``.

A network runs in one of two ways:

- ``features`` and ``classify`` (together: ``forward``) run whole blocks, for training and for evaluating
  every exit;
- ``start``, ``advance`` and ``classify_next`` go from exit to exit and compute only what the next exit reads,
  so that images can leave in between (``Stepwise`` takes these steps; ``early_exit`` is the shortest loop).

docs/extending.md says how to add a kind of network: it implements the abstract methods and sets ``config``,
``num_exits``, ``num_classes`` and ``feature_dims``; the other attributes have defaults.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .description import Description

# What later exits need of earlier blocks. Every tensor has the batch first. Keys are identifiers, such as
# "d4_s1", in a fixed order.
State = dict[str, Tensor]
# Returns one module for a layer and the BatchNorm after it, None where these two cannot be fused. The third
# argument says whether the layer's output is known to be (N, C).
Fuse = Callable[[nn.Module, nn.Module, bool], nn.Module | None]


class CannotBuildError(ValueError):
    """A file's network cannot be built, though the file is sound.

    It is a custom network that was not passed, or another one was passed, or its library is missing.
    """


class ExitNetwork(nn.Module, ABC):
    """A network with exits along its depth, each of which ends in a linear classifier.

    Attributes:
        kinds: Classes of networks by the name that files give them. A subclass is registered when it is
            defined.
        options_of_older_files: Values of the options that the ``config`` of an older file may lack. A
            fingerprint leaves options out at these values, so that an option added later changes none.
        training_options: Names of options that a fingerprint leaves out: those that decide only what is
            trained and were added after policy files existed. Older such options stay part of it, so that the
            files keep their fingerprints.
        config: Options, of plain types, from which ``from_config`` makes the same network.
        num_exits: Number of exits, K.
        num_classes: Number of classes, C.
        feature_dims: Number of features that each exit's classifier reads, one per exit.
        boosted: Whether exit k adds a share of the logits of exit k - 1 to its own.
        gradient_equilibrium: Whether ``features`` rescales gradients at the exits (``rescale``).
        has_new_classifier: Whether its last classifier is new, and did not come with pretrained weights; read
            from ``stage_1``.
        is_single_stage: Whether ISC and OFA train it together with the network under its exits.
        checkpoint_activations: In ``features``, keep only what passes between blocks for the backward pass,
            and compute the rest again there: less memory, more time.
        description: Description stored in its file, None without a file.
        fingerprint: Digest of the network that a folded copy was made from, None for all other networks.
    """

    kinds: ClassVar[dict[str, type["ExitNetwork"]]] = {}
    options_of_older_files: ClassVar[dict[str, Any]] = {}
    training_options: ClassVar[frozenset[str]] = frozenset()
    config: dict[str, Any]
    num_exits: int
    num_classes: int
    feature_dims: tuple[int, ...]
    boosted: bool = False
    gradient_equilibrium: bool = False
    has_new_classifier: bool = True
    is_single_stage: bool = False
    checkpoint_activations: bool = False
    description: "Description | None" = None
    fingerprint: str | None = None

    def __init_subclass__(cls, register: bool = True, **options: Any) -> None:
        """Register the new class in ``kinds``.

        Args:
            register: False leaves it out: such networks cannot be saved.
            options: Class arguments of other base classes.

        Raises:
            TypeError: Another class has this name. The same class may be defined again, as in a notebook.
        """
        super().__init_subclass__(**options)
        if not register:
            return
        other = ExitNetwork.kinds.get(cls.__name__, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"there is a network {cls.__name__} already, in {other.__module__}, and files name networks "
                f"by their classes: give the one in {cls.__module__} another name"
            )
        ExitNetwork.kinds[cls.__name__] = cls

    @property
    def kind(self) -> str:
        """Name of the class, for files and messages."""
        return type(self).__name__

    @property
    def title(self) -> str:
        """Name of the architecture, for tables and curves."""
        return self.kind

    # Making networks

    @classmethod
    def from_config(cls, config: dict[str, Any], network: nn.Module | None = None) -> "ExitNetwork":
        """Build the network that ``config`` describes, with new weights.

        Args:
            config: ``config`` of a network of this class, also as JSON returns it.
            network: A network without exits that is part of it, where ``config`` alone cannot describe that.

        Raises:
            CannotBuildError: A network was passed, and none is needed.
            ValueError: There is no such network.
        """
        if network is not None:
            raise CannotBuildError(f"it is a whole {cls.__name__}; load it without network=")
        return cls(**{**cls.options_of_older_files, **config})

    def for_classes(self, num_classes: int, same_classes: bool = False) -> "ExitNetwork":
        """Build a network like this one for other classes, with new weights, all trained.

        Args:
            num_classes: Number of classes.
            same_classes: Whether they are this network's own, so that its classifiers can be loaded.
        """
        return self.from_config({**self.config, "num_classes": num_classes})

    @property
    def stage_1(self) -> "ExitNetwork":
        """The network that stage 1 trained: this one, or the backbone of a stage-2 network."""
        return self

    @abstractmethod
    def check_image_size(self, size: int) -> None:
        """Raise ValueError if the network cannot take images of ``size`` x ``size`` pixels."""

    def can_run_channels_last(self) -> bool:
        """Return True if weights and images may be in the memory layout ``torch.channels_last``."""
        return True

    # Inference: evaluation mode, without Gradient Equilibrium. The arguments are never changed.

    @abstractmethod
    def start(self, images: Tensor) -> State:
        """Compute what the first block reads from images (N, 3, H, W)."""

    @abstractmethod
    def advance(self, k: int, state: State) -> tuple[Tensor, State]:
        """Compute what exit ``k`` needs.

        Args:
            k: Number of the exit, from 0.
            state: State of n images, from ``start`` (k = 0) or from ``advance`` of exit k - 1.

        Returns:
            The features (n, feature_dims[k]) of exit ``k``, and the state that exit k + 1 needs.
        """

    @abstractmethod
    def classify_next(self, k: int, features: Tensor, previous_logits: Tensor | None) -> Tensor:
        """Compute the logits (N, C) of exit ``k``.

        Args:
            k: Number of the exit, from 0.
            features: Features of exit ``k``, (N, feature_dims[k]).
            previous_logits: Logits of exit k - 1, (N, C); None for the first exit.
        """

    # Training: whole blocks, with Gradient Equilibrium.

    @abstractmethod
    def features(self, images: Tensor, num_exits: int | None = None) -> list[Tensor]:
        """Compute the features (N, feature_dims[k]) of the first ``num_exits`` exits (all if None).

        Args:
            images: (N, 3, H, W).
            num_exits: Exits to compute. If None, all. Gradients are rescaled for all exits of the network.
        """

    # Parameters

    @abstractmethod
    def classifier_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield name and parameter of the classifiers, which belong to the classes and fit no others."""

    def pretrained_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that came with pretrained weights and learn at a smaller learning rate."""
        yield from ()

    def freeze_pretrained(self) -> None:
        """Freeze the pretrained parameters, and keep their layers in evaluation mode.

        Raises:
            ValueError: There are none.
        """
        raise ValueError(f"{self.title} has no pretrained parameters: all its parameters are trained")

    def fold_batch_norm(self, fuse: Fuse) -> None:
        """Fold every BatchNorm into the layer before it, in place. Only evaluation mode is left.

        Args:
            fuse: Returns one module for a layer and the BatchNorm after it, None where these two cannot be
                fused. Its third argument says whether the layer's output is known to be (N, C).
        """
        fold_sequences(self, fuse, keep_places=True)

    # Shared by all networks

    def rescale(self, x: Tensor, factor: float) -> Tensor:
        """Return ``x``; with Gradient Equilibrium, its gradient is multiplied by ``factor``.

        This is the gradient re-scaling of Li et al. (ICCV 2019, arXiv 1908.06294), section 3.1.
        ``features`` of a network with K exits rescales what block k computes twice, with k from 0: by
        1 / (K - k) before exit k reads it, and by K - k - 1 before the next block does. The paper counts
        exits from 1: with i = k + 1, the gradient of exit i is multiplied by 1 / (K - i + 1), and that of the
        later blocks by (K - i) / (K - i + 1).

        The factors telescope: the gradient of every exit from k on reaches block k times 1 / (K - k). So the
        block gets the mean of their gradients and not the sum, however many exits follow. The layers of the
        exits themselves are left alone.

        The mode does not matter: a network may also be trained in evaluation mode, which keeps the statistics
        of BatchNorm. ``forward`` says how to get gradients that are not rescaled.
        """
        # Without autograd there is nothing to rescale, and no operation is added to inference and export.
        if not self.gradient_equilibrium or not torch.is_grad_enabled():
            return x
        return _RescaledGradient.apply(x, factor)

    def classify(self, features: list[Tensor]) -> list[Tensor]:
        """Compute the logits (N, C) of the first exits from their features."""
        logits: list[Tensor] = []
        for k, f in enumerate(features):
            logits.append(self.classify_next(k, f, logits[-1] if logits else None))
        return logits

    def forward(self, images: Tensor, num_exits: int | None = None) -> list[Tensor]:
        """Compute the logits (N, C) of the first ``num_exits`` exits (all if None) from images (N, 3, H, W).

        Gradients through this pass are for training: with Gradient Equilibrium they are rescaled, in
        evaluation mode too, so that those of the images are 1 / K of the true ones. For saliency maps or
        adversarial images go from exit to exit (``Stepwise``), which rescales nothing.
        """
        return self.classify(self.features(images, num_exits))

    @torch.no_grad()
    def early_exit(self, images: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Classify each image at the first exit whose largest probability reaches that exit's threshold.

        The images that leave are dropped from the batch, and later blocks run for the others only. The loop
        needs nothing but this module, so that ``torch.hub`` can offer it; ``AdaptivePredictor`` does more.

        Args:
            images: (N, 3, H, W), normalised as in training.
            thresholds: Threshold of every exit. All remaining images leave at the last exit, whatever its
                threshold.

        Returns:
            Logits (N, C) of the exit at which each image left, and the number (N,) of that exit, from 0.

        Raises:
            ValueError: The network is in training mode, or the number of thresholds is not that of the exits.
        """
        if len(thresholds) != self.num_exits:
            raise ValueError(f"there are {len(thresholds)} thresholds for {self.num_exits} exits")
        steps = Stepwise(self, images)
        remaining = torch.arange(len(images), device=images.device)
        for k, threshold in enumerate(thresholds):
            logits = steps.next_logits()
            if k == 0:
                result, exits = logits.clone(), torch.zeros_like(remaining)
            else:
                result[remaining], exits[remaining] = logits, k
            confidence = logits.float().softmax(dim=1).amax(dim=1)
            # Not "<": an image whose confidence is NaN stays. A copy of ``reaches_threshold`` in
            # ``adaptive_inference.confidence``: ``models`` imports nothing else of the project.
            stays = (confidence >= threshold).logical_not().nonzero().flatten()
            if len(stays) == 0:
                break
            steps.keep(stays)
            remaining = remaining[stays]
        return result, exits


class Stepwise:
    """One pass over the exits of a network for a batch that may shrink between exits.

    Each exit costs only what it reads ("lazy evaluation" in the MSDNet paper).

    Example:
        steps = Stepwise(network, images)
        first = steps.next_logits()    # (N, C), exit 1
        steps.keep(uncertain)          # a boolean mask or indices: the images that remain
        second = steps.next_logits()   # (n, C), exit 2, of those images only

    Args:
        network: In evaluation mode.
        images: (N, 3, H, W).

    Raises:
        ValueError: The network is in training mode.
    """

    def __init__(self, network: ExitNetwork, images: Tensor):
        check_evaluation_mode(network)
        self.network, self.exits_done = network, 0
        self._state: State = network.start(images)
        self._logits: Tensor | None = None

    def next_logits(self) -> Tensor:
        """Compute the logits (n, C) of the next exit for the remaining images.

        Raises:
            IndexError: All exits are done.
        """
        k = self.exits_done
        if k == self.network.num_exits:
            raise IndexError(f"all {k} exits are done")
        features, self._state = self.network.advance(k, self._state)
        self._logits = self.network.classify_next(k, features, self._logits)
        self.exits_done += 1
        return self._logits

    def keep(self, images: Tensor) -> None:
        """Keep only these of the remaining images: a boolean mask (n,) or indices.

        Indices are better on a GPU: a mask makes the host wait for the number of images, once per tensor.
        """
        self._state = {key: x[images] for key, x in self._state.items()}
        if self._logits is not None:
            self._logits = self._logits[images]


class _RescaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def checked_num_exits(network: ExitNetwork, num_exits: int | None) -> int:
    """Return ``num_exits``, or the number of all exits for None.

    Raises:
        ValueError: The network has fewer exits.
    """
    if num_exits is None:
        return network.num_exits
    if not 1 <= num_exits <= network.num_exits:
        raise ValueError(f"num_exits is {num_exits}; this network has 1 to {network.num_exits}")
    return num_exits


def check_evaluation_mode(network: nn.Module) -> None:
    """Raise ValueError in training mode: BatchNorm over a shrinking batch would change later exits."""
    if network.training:
        raise ValueError("early exit needs a network in evaluation mode: call network.eval() first")


def to_config(network: ExitNetwork) -> dict[str, Any]:
    """Return kind and ``config`` of a network, from which ``build_network`` makes the same network."""
    return {"type": network.kind, **network.config}


def build_network(options: dict[str, Any], network: nn.Module | None = None) -> ExitNetwork:
    """Build the network that ``to_config`` describes, with new weights.

    Args:
        options: Options, of which ``type`` is one of ``ExitNetwork.kinds``: a file runs no code of its own.
        network: A network without exits that is part of it, as for ``ExitNetwork.from_config``.

    Raises:
        ValueError: There is no such network.
    """
    config = dict(options)
    # Older files do not name the kind of the backbone of a stage-2 network.
    kind = config.pop("type", "Backbone" if "library" in config else "MSDNet")
    if kind not in ExitNetwork.kinds:
        raise ValueError(f"its type is {kind!a:.60}, not one of {', '.join(ExitNetwork.kinds)}")
    return ExitNetwork.kinds[kind].from_config(config, network)


def fold_sequences(module: nn.Module, fuse: Fuse, is_2d: bool = False, keep_places: bool = False) -> None:
    """Fold every BatchNorm in an ``nn.Sequential`` into the layer before it, in place.

    Args:
        module: It and all modules inside are searched for sequences.
        fuse: As for ``ExitNetwork.fold_batch_norm``.
        is_2d: Whether all that these sequences compute is known to be (N, C): the modules alone do not tell
            a linear layer on features (N, C) from one on tokens (N, L, C).
        keep_places: Leave an identity where a BatchNorm was, for networks that index their sequences.
    """
    if type(module).forward is nn.Sequential.forward:
        layers, previous = module._modules, None
        for key, layer in list(layers.items()):
            both = None if previous is None else fuse(layers[previous], layer, is_2d)
            if both is None:
                previous = key
                continue
            layers[previous], layers[key] = both, nn.Identity()
            if not keep_places:
                del layers[key]
    for child in module.children():
        fold_sequences(child, fuse, is_2d, keep_places)
