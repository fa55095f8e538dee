"""Early exit for real: answered images leave the batch, and later blocks run on the others only, or not at all.

    predictor = AdaptivePredictor(network, choose(curve, operations=5e6).policy)
    prediction = predictor(images)                       # (N, 3, H, W)
    prediction.classes, prediction.confidence, prediction.exits   # (N,) each

    timing = measure_blocks(network, images[:1])
    predictor = AnytimePredictor(network, 5.0, timing)              # the best answer within 5 ms
    predictor = BudgetPredictor(network, curve.of_rule(None), 2.0, timing)   # 2 ms an image on average

Answers are those of the simulation (``simulate``): an image leaves at the first exit whose confidence reaches that exit's threshold.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from adaptive_inference.budgeted import NONE_LEAVE, assign_exits
from adaptive_inference.policies import Answer, Point, Policy, confidence_by_exit, next_answer, within
from utils import UserError

if TYPE_CHECKING:
    from adaptive_inference.promises.timing import BlockTimes


ALLOWED_LATE = 0.005  # share of the calls that may miss a deadline
CAUTION = 0.2  # of the reserved times, that a late call adds to them; it wears off while calls are in time
HORIZON_IMAGES, HORIZON_CALLS = 64, 2  # within their sum what was saved or overspent is made up for


class Prediction(NamedTuple):
    """Answers to N images, on the device of the images: ``classes`` (N,) int64, ``confidence`` (N,), the probability of that class,
    ``exits`` (N,) int64, 0-based, at which they left, and ``probs`` (N, C) of all classes, by the policy's temperatures or ensemble."""

    classes: Tensor
    confidence: Tensor
    exits: Tensor
    probs: Tensor


class AdaptivePredictor:
    """Classify batches with a network that stops as early as a policy allows.

    Args:
        network: ``MSDNet`` or ``IMTA`` in evaluation mode (best in its ``inference_form``). With a
            ``description``, as ``models.load`` gives it, it knows its image size, and how to normalise bytes.
        policy: who leaves when, and how answers are made.
        lazy: as for ``models.Stepwise``.

    Raises:
        ValueError: the policy has not one threshold an exit.
    """

    def __init__(self, network: nn.Module, policy: Policy, lazy: bool = True):
        if len(policy.thresholds) != network.num_exits:
            raise ValueError(
                f"the policy has {len(policy.thresholds)} thresholds, the network {network.num_exits} exits"
            )
        self.network, self.policy, self.lazy = network, policy, lazy
        self._scale: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Prediction:
        """Answer images (N, 3, H, W), uint8 as they are in files, or floats normalised as in training.

        The host waits for the device at most once a block, to learn how many images go on; when none does, nothing more is launched.

        Raises:
            UserError: the images are of another shape or type.
        """
        images = self._checked(images)
        if len(images) == 0:
            none = torch.empty(0, dtype=torch.int64, device=images.device)
            return self._answer([torch.empty(0, self.network.num_classes, device=images.device)], none)
        run = self.network.begin(images, self.lazy)
        seen: list[Tensor] = []  # logits (N, C) of every exit so far, zero where an image has left before
        exits = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        here: Tensor | None = None  # indices of the images still in the batch, None for all
        answer: Answer | None = None
        for k, threshold in enumerate(self.policy.thresholds):
            if not self._may_start(k, len(images) if here is None else len(here)):
                break
            logits = run.next_logits()
            answer = next_answer(self.policy.measure, logits, answer)
            # Every present image is answered; a later exit overrules. That needs no list of those that leave.
            if here is None:
                seen.append(logits)
                exits.fill_(k)
            else:
                seen.append(logits.new_zeros(len(images), logits.shape[1]).index_copy_(0, here, logits))
                # Not by index: a number there would be a tensor of the host, for which a GPU is waited for.
                exits.index_fill_(0, here, k)
            if k == len(self.policy.thresholds) - 1:
                break
            leaves = self._leaves(answer, threshold)
            if len(leaves) == 1:
                if leaves.item():
                    break
                continue
            going_on = leaves.logical_not().nonzero().flatten()  # the one wait of this block
            if len(going_on) == 0:
                break
            if len(going_on) < len(leaves):
                run.keep(going_on)
                here = going_on if here is None else here[going_on]
                answer = Answer(answer.classes[going_on], answer.confidence[going_on])
        return self._answer(seen, exits)

    def _may_start(self, k: int, num_images: int) -> bool:
        return True

    def _leaves(self, answer: Answer, threshold: float) -> Tensor:
        return answer.confidence >= threshold

    def _answer(self, logits: Sequence[Tensor], exits: Tensor) -> Prediction:
        return _prediction(logits, exits, self.policy)

    def _checked(self, images: Tensor) -> Tensor:
        description = self.network.description
        size = ("height", "width") if description is None else (description.image_size,) * 2
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
        if self._scale is None or self._scale.device != images.device:
            mean, std = (
                torch.tensor(values).reshape(1, 3, 1, 1) for values in (description.mean, description.std)
            )
            self._scale, self._shift = (1 / (255 * std)).to(images.device), (-mean / std).to(images.device)
        return torch.addcmul(self._shift, images.to(self._scale.dtype), self._scale)


class AnytimePredictor(AdaptivePredictor):
    """Answer each batch by a deadline, with the last exit that was finished in time: no block is started that would not end in time.

    After a late answer more time is reserved for a while, so that few are late also where something else slows the machine.

    Args:
        network: as for ``AdaptivePredictor``.
        milliseconds: from the call to the answer, for a batch as a whole.
        timing: of this network on this machine at least at the batch size in use, from ``timing.measure_blocks``. Almost all measured
            passes through a block took no longer than is reserved for it.
        policy: images may leave earlier still; None: every image stays until the deadline.

    Raises:
        UserError: not even the first exit would end in time.
    """

    def __init__(
        self, network: nn.Module, milliseconds: float, timing: "BlockTimes", policy: Policy | None = None
    ):
        super().__init__(network, policy or Policy((NONE_LEAVE,) * network.num_exits))
        self.milliseconds, self.timing, self._began, self._margin = milliseconds, timing, 0.0, 1.0
        needed = timing.reserve(0, timing.batch_size)
        if needed > milliseconds:
            raise UserError(
                f"a deadline of {milliseconds:g} ms is too short here: the first exit takes up to {needed:.3g} ms for a batch of "
                f"{timing.batch_size}"
            )

    def __call__(self, images: Tensor) -> Prediction:
        """As ``AdaptivePredictor``; the clock starts now."""
        self._began = time.perf_counter()
        prediction = super().__call__(images)
        wait_for(images.device)
        self._margin = max(
            1.0, self._margin + CAUTION * ((self._elapsed() > self.milliseconds) - ALLOWED_LATE)
        )
        return prediction

    def _elapsed(self) -> float:
        return 1e3 * (time.perf_counter() - self._began)

    def _may_start(self, k: int, num_images: int) -> bool:
        return (
            k == 0 or self._elapsed() + self._margin * self.timing.reserve(k, num_images) <= self.milliseconds
        )


class BudgetPredictor(AdaptivePredictor):
    """Answer in so many milliseconds an image on average: the policy changes with the time that was really spent.

    Args:
        network: as for ``AdaptivePredictor``.
        points: of a policy curve, those that may be used.
        milliseconds: an image, the mean over all calls. Where even the dearest policy is cheaper, less is spent.
        timing: of this network on this machine at the batch size in use, from ``timing.measure_blocks``.

    Raises:
        UserError: the cheapest policy is expected to take longer.
    """

    def __init__(
        self, network: nn.Module, points: Sequence[Point], milliseconds: float, timing: "BlockTimes"
    ):
        self.milliseconds, self.points = milliseconds, points
        self.expected = [timing.milliseconds(point.shares) for point in points]
        self.point = max(within(points, self.expected, milliseconds, "ms"), key=lambda point: point.val_acc1)
        super().__init__(network, self.point.policy)
        self._images, self._spent, self._foreseen = 0, 0.0, 0.0

    def __call__(self, images: Tensor) -> Prediction:
        """As ``AdaptivePredictor``; waits for the answers, to learn how long they took."""
        began = time.perf_counter()
        prediction = super().__call__(images)
        wait_for(images.device)
        self._images += len(images)
        self._spent += 1e3 * (time.perf_counter() - began)
        self._foreseen += len(images) * self.expected[self.points.index(self.point)]
        self._steer(len(images))
        return prediction

    def _steer(self, batch_size: int) -> None:
        """Choose the next policy by what was spent."""
        horizon = HORIZON_IMAGES + HORIZON_CALLS * batch_size
        saved = self._images * self.milliseconds - self._spent
        # At first the measured times are trusted.
        trust = horizon * self.milliseconds
        slowness = (self._spent + trust) / (self._foreseen + trust)
        target = max((self.milliseconds + saved / horizon) / slowness, min(self.expected))
        self.point = max(within(self.points, self.expected, target, "ms"), key=lambda point: point.val_acc1)
        self.policy = self.point.policy


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def simulate(logits: Tensor, policy: Policy) -> Prediction:
    """What the predictor answers, from the logits (K, N, C) of every exit."""
    confidence, _ = confidence_by_exit(logits, policy.measure)
    return _prediction(
        logits, assign_exits(confidence, torch.tensor(policy.thresholds, dtype=torch.float64)), policy
    )


def _prediction(logits: Sequence[Tensor], exits: Tensor, policy: Policy) -> Prediction:
    """From the logits (N, C) of all exits that were run, or more, and the one at which each image leaves."""
    stacked = logits if isinstance(logits, Tensor) else torch.stack(logits)
    if stacked.dtype in (torch.float16, torch.bfloat16):
        stacked = stacked.float()
    if policy.temperatures or policy.ensemble:
        weights = torch.tensor(policy.weights, dtype=stacked.dtype).to(stacked.device)[
            exits, : len(stacked)
        ]  # (N, exits run)
        answered = torch.einsum("nk,knc->nc", weights, stacked)
    else:
        answered = stacked[exits, torch.arange(len(exits), device=stacked.device)]
    probs = torch.softmax(answered, dim=1)
    confidence, classes = probs.max(dim=1)
    return Prediction(classes, confidence, exits, probs)


def _shape(sizes: tuple) -> str:
    return " x ".join(map(str, sizes))
