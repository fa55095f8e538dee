"""Predictors that keep a time limit: a deadline per call, or a mean time per image.

Example:
    timing = measure_blocks(network, images[:1])
    predictor = AnytimePredictor(network, 5.0, timing)          # the last exit that ends within 5 ms
    predictor = BudgetPredictor(network, points, 2.0, timing)   # 2 ms per image on average

Neither is a hard real-time guarantee: both rely on measured times, and adapt when the machine becomes slower
or faster.
"""

import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from adaptive_inference.block_times import BlockTimes, wait_for
from adaptive_inference.confidence import NONE_LEAVE
from adaptive_inference.points import points_within_budget
from adaptive_inference.policies import Point, Policy
from adaptive_inference.predictor import AdaptivePredictor, Prediction
from models import ExitNetwork
from utils import UserError

RECENT_CALLS = 200  # calls that decide how much time is reserved now
ALLOWED_LATE = 2  # calls among them that may have taken longer than would be reserved
HORIZON_IMAGES, HORIZON_CALLS = 64, 2  # most of a difference from the budget is made up for within their sum
HORIZON_PARTS = 4
NUM_DEADLINES = 8

Clock = Callable[[], float]  # returns seconds


class AnytimePredictor(AdaptivePredictor):
    """Predict each batch by a deadline, with the last exit that finishes in time.

    A block starts only if it would end in time by its reserved time, multiplied by ``margin``. The margin is
    how much longer than reserved the last block of a call took, in all but ``ALLOWED_LATE`` of the last
    ``RECENT_CALLS`` calls, and at least 1. It therefore follows a slower machine after three calls, and
    returns to 1 within ``RECENT_CALLS`` calls once the machine is fast again. Threads need a predictor each.

    Args:
        network: The network that predicts, as for ``AdaptivePredictor``.
        milliseconds: Time from the call to the prediction, for the whole batch.
        timing: Times of this network on this machine, for the batch size in use or a larger one, from
            ``measure_blocks``.
        policy: Lets images leave even earlier. If None, every image stays until the deadline.
        clock: Returns the time in seconds.

    Raises:
        UserError: Not even the first exit would end in time.
    """

    def __init__(
        self,
        network: ExitNetwork,
        milliseconds: float,
        timing: BlockTimes,
        policy: Policy | None = None,
        clock: Clock = time.perf_counter,
    ):
        super().__init__(network, policy or Policy((NONE_LEAVE,) * network.num_exits))
        self.milliseconds, self.timing, self.clock = milliseconds, timing, clock
        self._call_began = self._block_began = self._reserved = 0.0
        self._slowness: deque[float] = deque(maxlen=RECENT_CALLS)  # time taken / time reserved, by call
        needed = timing.reserve(0, timing.batch_size)
        if needed > milliseconds:
            raise UserError(
                f"a deadline of {milliseconds:g} ms is too short here: the first exit takes up to "
                f"{needed:.3g} ms for a batch of {timing.batch_size}"
            )

    @property
    def margin(self) -> float:
        """Factor by which reserved times are multiplied now."""
        largest = heapq.nlargest(ALLOWED_LATE + 1, self._slowness)
        return max(1.0, largest[-1]) if len(largest) > ALLOWED_LATE else 1.0

    def __call__(self, images: Tensor) -> Prediction:
        """Predict the class of each image, as ``AdaptivePredictor`` does; the clock starts now."""
        self._call_began = self._block_began = self.clock()
        self._reserved = self.timing.reserve(0, len(images))
        prediction = super().__call__(images)
        wait_for(images.device)
        self._slowness.append(1e3 * (self.clock() - self._block_began) / self._reserved)
        return prediction

    def may_start(self, k: int, num_images: int) -> bool:
        """Return whether block ``k`` would end in time."""
        if k == 0:
            return True
        now, reserved = self.clock(), self.timing.reserve(k, num_images)
        if 1e3 * (now - self._call_began) + self.margin * reserved > self.milliseconds:
            return False
        self._block_began, self._reserved = now, reserved
        return True


class BudgetPredictor(AdaptivePredictor):
    """Predict within a mean time per image: the policy changes with the time that was really spent.

    The mean holds over many calls; most of a difference is made up for within the next ``HORIZON_IMAGES``
    images and ``HORIZON_CALLS`` calls, so a shorter run may exceed its budget. Threads need a predictor each.

    Args:
        network: The network that predicts, as for ``AdaptivePredictor``.
        points: Points of a policy curve that may be used.
        milliseconds: Mean time per image over all calls. Less is spent where even the most expensive policy
            is cheaper.
        timing: Times of this network on this machine at the batch size in use, from ``measure_blocks``.
        clock: Returns the time in seconds.

    Raises:
        UserError: The cheapest policy is expected to take longer.
    """

    def __init__(
        self,
        network: ExitNetwork,
        points: Sequence[Point],
        milliseconds: float,
        timing: BlockTimes,
        clock: Clock = time.perf_counter,
    ):
        self.milliseconds, self.points, self.clock = milliseconds, points, clock
        self.expected = [timing.milliseconds(point.shares) for point in points]
        self.point = self._best_within(milliseconds)
        super().__init__(network, self.point.policy)
        self._images, self._spent_ms, self._expected_ms = 0, 0.0, 0.0

    def __call__(self, images: Tensor) -> Prediction:
        """Predict the class of each image, as ``AdaptivePredictor`` does, and wait for the device."""
        began = self.clock()
        prediction = super().__call__(images)
        wait_for(images.device)
        self._images += len(images)
        self._spent_ms += 1e3 * (self.clock() - began)
        self._expected_ms += len(images) * self.expected[self.points.index(self.point)]
        self._choose_next(len(images))
        return prediction

    def _best_within(self, milliseconds: float) -> Point:
        allowed = points_within_budget(self.points, self.expected, milliseconds, "ms")
        return max(allowed, key=lambda point: point.val_acc1)

    def _choose_next(self, batch_size: int) -> None:
        """Choose the next policy from the time spent so far."""
        # To make up for nearly all of a difference within the horizon, each call plans with a part of it.
        images = max((HORIZON_IMAGES + HORIZON_CALLS * batch_size) / HORIZON_PARTS, batch_size)
        saved_ms = self._images * self.milliseconds - self._spent_ms
        # The measured times count as much as these images, so that the first calls alone decide little.
        prior_ms = images * self.milliseconds
        slowness = (self._spent_ms + prior_ms) / (self._expected_ms + prior_ms)
        target = (self.milliseconds + saved_ms / images) / slowness
        self.point = self._best_within(max(target, min(self.expected)))
        self.policy = self.point.policy


def deadline_rows(
    network: ExitNetwork,
    images: Tensor,
    times: BlockTimes,
    acc1: list[float],
    policy: Policy | None = None,
    calls: int = 500,
) -> list[dict]:
    """Measure predictions by deadlines from that of the first exit to that of the last, one image at a time.

    Args:
        network: The network that predicts.
        images: (N, 3, H, W), as the predictor takes them.
        times: Times of its blocks at batch size 1.
        acc1: Accuracy of every exit over all images: time alone decides which exit predicts.
        policy: See ``AnytimePredictor``.
        calls: Number of calls per deadline.

    Returns:
        One row per deadline: ``milliseconds``; ``acc1`` in percent; ``late``, the share of the calls that
        took longer; ``share_k``, the share that exit k predicted.
    """
    first = 1.02 * times.reserve(0, 1)
    usual_time = 1.1 * sum(usual[0] for usual in times.usual[:-1])
    last = max(usual_time + times.reserve(network.num_exits - 1, 1), first)
    rows = []
    # On a busy machine the first exit alone may reserve as much as all: then there is one deadline.
    for deadline in np.unique(np.linspace(first, last, NUM_DEADLINES)).tolist():
        predictor, late, exits = AnytimePredictor(network, deadline, times, policy), 0, []
        for call in range(calls):
            image = images[call % len(images)][None]
            wait_for(images.device)
            began = time.perf_counter()
            prediction = predictor(image)
            wait_for(images.device)
            late += 1e3 * (time.perf_counter() - began) > deadline
            exits.append(prediction.exits)
        shares = (torch.bincount(torch.cat(exits).cpu(), minlength=network.num_exits) / calls).tolist()
        reached = sum(share * accuracy for share, accuracy in zip(shares, acc1, strict=True))
        by_exit = {f"share_{k}": round(share, 4) for k, share in enumerate(shares, start=1)}
        row = {"milliseconds": round(deadline, 4), "acc1": round(reached, 4), "late": late / calls}
        rows.append(row | by_exit)
    return rows
