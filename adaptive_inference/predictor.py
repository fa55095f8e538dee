"""Prediction that stops early: images leave the batch at exits, and later blocks run for the others only.

Example:
    predictor = AdaptivePredictor(network, choose(curve, operations=5e6).policy)
    prediction = predictor(images)                       # (N, 3, H, W)
    prediction.classes, prediction.confidence, prediction.exits   # (N,) each

An image leaves at the first exit whose confidence reaches that exit's threshold. ``simulate`` predicts the
same from the logits of all exits.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptive_inference.confidence import (
    ExitPrediction,
    assign_exits,
    confidence_by_exit,
    next_prediction,
    reaches_threshold,
    without_half_precision,
)
from adaptive_inference.policies import Policy
from models import ExitNetwork, Stepwise
from models.description import DataInfo
from models.normalizer import Normalizer
from utils import UserError

SHOWN_IMAGES = 10  # in an error message

# Makes bytes (3, S, S) of an image file or a PIL image, for a network with this ``DataInfo``.
Preprocess = Callable[[Any, DataInfo], Tensor]


class NotFiniteError(UserError):
    """The network's output is not finite for some images of a batch.

    Attributes:
        positions: Their positions in the batch, from 0.
    """

    def __init__(self, positions: list[int], batch_size: int):
        shown = ", ".join(map(str, positions[:SHOWN_IMAGES]))
        more = ", ..." if len(positions) > SHOWN_IMAGES else ""
        super().__init__(
            f"the network's output is not finite for {len(positions)} of {batch_size} images; "
            f"their positions in the batch, from 0: {shown}{more}"
        )
        self.positions = positions


class Prediction(NamedTuple):
    """Predictions for N images, on the device of the images.

    Attributes:
        classes: (N,) int64.
        confidence: (N,), the probability of that class.
        exits: (N,) int64, numbers of the exits at which the images left, from 0.
        probs: (N, C), of all classes, with the policy's temperatures or ensemble.
        log_sum_exp: (N,), of the logits of the exit that predicted, without temperatures or ensemble;
            ``promises.drift`` watches it.
    """

    classes: Tensor
    confidence: Tensor
    exits: Tensor
    probs: Tensor
    log_sum_exp: Tensor


class AdaptivePredictor:
    """Classify batches with a network that stops as early as a policy allows.

    Args:
        network: In evaluation mode, best folded (``fold``). With a ``description``, as ``models.load`` gives
            it, it knows its image size, and how to normalise bytes.
        policy: Decides which images leave at which exit, and how the exits so far predict.
        preprocess: Default of ``predict_images``; ``load_predictor`` sets it.

    Raises:
        ValueError: The policy does not have one threshold per exit.
    """

    def __init__(self, network: ExitNetwork, policy: Policy, preprocess: Preprocess | None = None):
        if len(policy.thresholds) != network.num_exits:
            raise ValueError(
                f"the policy has {len(policy.thresholds)} thresholds, the network {network.num_exits} exits"
            )
        self.network, self.policy, self.preprocess = network, policy, preprocess
        self._normalize: Normalizer | None = None

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Prediction:
        """Classify images (N, 3, H, W), uint8 as they are in files, or floats normalised as in training.

        Beside ``ExitNetwork.early_exit``, the shortest such loop, this one follows a policy, reports outputs
        that are not finite, waits for the device as rarely as possible, and can be overridden in parts.

        The host waits for the device once per block, to learn how many images remain, and once at the end.
        When no image remains, later blocks are not launched.

        Raises:
            UserError: The images are of another shape or type.
            NotFiniteError: The network's output for some of the images is not finite.
        """
        images = self._checked(images)
        if len(images) == 0:
            none = torch.empty(0, dtype=torch.int64, device=images.device)
            return self.finish([torch.empty(0, self.network.num_classes, device=images.device)], none)
        steps = Stepwise(self.network, images)
        seen: list[Tensor] = []  # logits (N, C) of every exit so far, zero where an image has left before
        exits = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        remaining: Tensor | None = None  # indices of the remaining images, None for all
        current: ExitPrediction | None = None
        for k, threshold in enumerate(self.policy.thresholds):
            if not self.may_start(k, len(images) if remaining is None else len(remaining)):
                break
            logits = steps.next_logits()
            current = next_prediction(self.policy.measure, logits, current)
            # Overwrite the results of all remaining images at every exit: no list of leaving images needed.
            if remaining is None:
                seen.append(logits)
                exits.fill_(k)
            else:
                seen.append(logits.new_zeros(len(images), logits.shape[1]).index_copy_(0, remaining, logits))
                # Not exits[remaining] = k: that would copy k to the device and wait for it.
                exits.index_fill_(0, remaining, k)
            if k == len(self.policy.thresholds) - 1:
                break
            leaves = self.leaves(current.confidence, threshold)
            if len(leaves) == 1:  # one image leaves or stays: nothing has to be selected, which saves time
                if leaves.item():
                    break
                continue
            stays = leaves.logical_not().nonzero().flatten()  # the one wait of this block
            if len(stays) == 0:
                break
            if len(stays) < len(leaves):
                steps.keep(stays)
                remaining = stays if remaining is None else remaining[stays]
                current = ExitPrediction(current.confidence[stays], current.classes[stays])
        return self.finish(seen, exits)

    def predict_images(
        self,
        images: Sequence[Any],
        preprocess: Preprocess | None = None,
        batch_size: int = 64,
    ) -> Prediction:
        """Classify image files or PIL images of any size.

        The network needs a ``description``, which says how its images are prepared.

        Args:
            images: Paths or PIL images.
            preprocess: Makes bytes (3, S, S) of one of them, such as ``image_data.preprocessing.preprocess``;
                If None, that of the predictor, which ``load_predictor`` sets.
            batch_size: Images that are preprocessed and predicted at a time.

        Raises:
            TypeError: ``images`` is a single path or image, or no sequence.
            ValueError: ``preprocess`` is missing here and in the predictor, or the network has no
                description.
            UserError: An image cannot be read.
            NotFiniteError: The network's output for some of the images is not finite.
        """
        if isinstance(images, (str, os.PathLike)):
            raise TypeError(f"images is the path {os.fspath(images)!r}; pass a list of paths or PIL images")
        if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
            raise TypeError(f"images is of type {type(images).__name__}; pass a list of paths or PIL images")
        preprocess = preprocess or self.preprocess
        if preprocess is None:
            raise ValueError("preprocess is missing: pass image_data.preprocessing.preprocess")
        if self.network.description is None:
            raise ValueError(
                "the network has no description, which says how images are prepared: load it with "
                "models.load, or call the predictor with prepared images (N, 3, H, W)"
            )
        device, data = next(self.network.parameters()).device, self.network.description.data
        if len(images) == 0:
            return self(torch.empty(0, 3, data.image_size, data.image_size, dtype=torch.uint8, device=device))
        predictions = []
        for start in range(0, len(images), batch_size):
            pixels = torch.stack([preprocess(image, data) for image in images[start : start + batch_size]])
            try:
                predictions.append(self(pixels.to(device)))
            except NotFiniteError as error:
                positions = [start + position for position in error.positions]
                raise NotFiniteError(positions, len(images)) from None
        return Prediction(*map(torch.cat, zip(*predictions, strict=True)))

    # Subclasses may override these three methods.

    def may_start(self, k: int, num_images: int) -> bool:
        """Return whether block ``k`` may start for ``num_images``; if not, the exits so far predict."""
        return True

    def leaves(self, confidence: Tensor, threshold: float) -> Tensor:
        """Return which of the n remaining images leave at an exit, (n,) bool, from their confidence (n,)."""
        return reaches_threshold(confidence, threshold)

    def finish(self, logits: Sequence[Tensor], exits: Tensor) -> Prediction:
        """Return the predictions.

        Args:
            logits: (N, C) of every exit that ran.
            exits: (N,), the exit at which each image left.

        Raises:
            NotFiniteError: The logits of some images are not finite.
        """
        prediction = _prediction(logits, exits, self.policy)
        is_finite = prediction.confidence.isfinite()
        if not is_finite.all():
            raise NotFiniteError(is_finite.logical_not().nonzero().flatten().tolist(), len(exits))
        return prediction

    def _checked(self, images: Tensor) -> Tensor:
        description = self.network.description
        size = ("height", "width") if description is None else (description.data.image_size,) * 2
        if not isinstance(images, Tensor):
            raise UserError(f"images are a {type(images).__name__}; this network wants a tensor")
        if (
            images.dim() != 4
            or images.shape[1] != 3
            or (description is not None and images.shape[2:] != size)
        ):
            raise UserError(
                f"images are {_shape(images.shape)}; this network wants {_shape(('N', 3, *size))}"
            )
        if images.is_floating_point():
            return images
        if images.dtype != torch.uint8 or description is None:
            wanted = "normalised floats" if description is None else "uint8, or normalised floats"
            raise UserError(
                f"images are {str(images.dtype).removeprefix('torch.')}; this network wants {wanted}"
            )
        if self._normalize is None or self._normalize.device != images.device:
            self._normalize = Normalizer(description.data.mean, description.data.std, images.device)
        return self._normalize(images).to(next(self.network.parameters()).dtype)


def simulate(logits: Tensor, policy: Policy) -> Prediction:
    """Return what ``AdaptivePredictor`` predicts, from the logits (K, N, C) of every exit."""
    confidence, _ = confidence_by_exit(logits, policy.measure)
    exits = assign_exits(confidence, torch.tensor(policy.thresholds, dtype=torch.float64))
    # The predictor has zeros for exits after an image left, where infinity times a weight of 0 would be NaN.
    has_left = torch.arange(len(logits), device=logits.device)[:, None] > exits  # (K, N)
    return _prediction(logits.masked_fill(has_left[..., None], 0), exits, policy)


def _prediction(logits: Sequence[Tensor], exits: Tensor, policy: Policy) -> Prediction:
    """Return predictions, from the logits (N, C) of all exits that ran, or more, and each image's exit."""
    stacked = logits if isinstance(logits, Tensor) else torch.stack(logits)
    stacked = without_half_precision(stacked)  # (exits that ran, N, C)
    exit_logits = stacked[exits, torch.arange(len(exits), device=stacked.device)]  # (N, C)
    combined = exit_logits
    if policy.temperatures or policy.ensemble:
        weights = torch.tensor(policy.weights, dtype=stacked.dtype).to(stacked.device)  # (K, K)
        weights = weights[exits, : len(stacked)]  # (N, exits that ran)
        stacked = stacked.masked_fill((weights == 0).T[..., None], 0)  # also where they are infinite
        combined = torch.einsum("nk,knc->nc", weights, stacked)
    probs = torch.softmax(combined, dim=1)
    confidence, classes = probs.max(dim=1)
    return Prediction(classes, confidence, exits, probs, torch.logsumexp(exit_logits, dim=1))


def _shape(sizes: tuple) -> str:
    return " x ".join(map(str, sizes))
