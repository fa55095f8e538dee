"""Measured time of blocks and policies, beside counted operations.

Example:
    times = measure_blocks(network, images[:1], batch_size=64)    # two seconds
    times.milliseconds(point.shares)                              # expected of a policy, per image
    times.reserve(k, 64)                                          # milliseconds that block k rarely exceeds

The time of a policy is the sum over its blocks at the batch sizes that occur: n of B images reach block k,
and n is binomial with the share of the held-out images that reached it. Blocks are timed inside the
predictor, together with everything it does between them.
"""

import random
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from adaptive_inference.block_times import BlockTimes, wait_for
from adaptive_inference.confidence import NONE_LEAVE
from adaptive_inference.policies import Point, Policy
from adaptive_inference.predictor import AdaptivePredictor, Prediction
from models import ExitNetwork

MAX_SECONDS = 2.0
RESERVED = 0.998  # quantile of the measured times of a block that deadlines reserve for it
NUM_GROUPS = 5  # passes are grouped by similar batch size; each group gets a median
TURN = 8  # batches timed with one policy before the next policy has its turn


def measure_blocks(
    network: ExitNetwork, images: Tensor, batch_size: int = 1, seconds: float = MAX_SECONDS
) -> BlockTimes:
    """Measure the time of every block, for the batch sizes that occur as images leave a batch.

    Args:
        network: Folded, with the dtype and on the device that will predict.
        images: (n, 3, H, W), at least one, as the predictor takes them; their content makes no difference.
        batch_size: Expected number of images per call.
        seconds: Limit for the whole measurement. A batch too large for it is assumed to cost in proportion to
            a smaller one.
    """
    ends = time.perf_counter() + seconds
    watch = _Stopwatch(network)
    size, batch = 1, images[:1].contiguous()
    watch.time_blocks(batch)
    spans, sizes = watch.time_blocks(batch)
    while size < batch_size and 8e-3 * spans.sum() < ends - time.perf_counter():
        size = min(2 * size, batch_size)
        batch = images[:1].expand(size, -1, -1, -1).contiguous()
        spans, sizes = watch.time_blocks(batch)
    passes = [(spans, sizes)]
    while time.perf_counter() < ends:
        passes.append(watch.time_blocks(batch))
    return _summary(batch_size, *(np.array(values).T for values in zip(*passes, strict=True)))


def _summary(batch_size: int, spans: np.ndarray, sizes: np.ndarray) -> BlockTimes:
    """Summarise P passes: milliseconds (K + 1, P) of blocks and prediction, images (K, P) per block."""
    num_passes = sizes.shape[1]
    # One group of spans by size for each block, and at the end for the prediction, which is for all images.
    rows = [*sizes, np.full(num_passes, batch_size)]
    groups = [_by_size(span, row) for span, row in zip(spans, rows, strict=True)]
    timed_sizes = [np.array(list(group)) for group in groups]
    medians = [np.array([np.median(values) for values in group.values()]) for group in groups]
    high = [np.array([np.quantile(values, RESERVED) for values in group.values()]) for group in groups]
    # Budgets are about means, which interruptions raise above the medians: scale these to the measured sum.
    total = 0.0
    for group, group_medians in zip(groups, medians, strict=True):
        counts = [len(values) for values in group.values()]
        total += sum(median * count for median, count in zip(group_medians, counts, strict=True))
    usual = [group_medians * spans.sum() / total for group_medians in medians]
    after = float(usual[-1][-1]), float(high[-1][-1])
    return BlockTimes(batch_size, tuple(timed_sizes[:-1]), tuple(usual[:-1]), tuple(high[:-1]), after)


def _by_size(spans: np.ndarray, sizes: np.ndarray) -> dict[float, list[float]]:
    """Group the spans (P,) of one block by similar numbers of images (P,): median number -> spans."""
    by_size: dict[float, list[float]] = {}
    for group in np.array_split(np.argsort(sizes, kind="stable"), NUM_GROUPS):
        if len(group):
            by_size.setdefault(float(np.median(sizes[group])), []).extend(spans[group])
    return by_size


class _Stopwatch(AdaptivePredictor):
    """A predictor that measures its blocks.

    Some images of a larger batch leave at every exit, at random: in some calls most of them, in others hardly
    any. So all batch sizes occur, and are warmed up for the predictor that is used afterwards.
    """

    def __init__(self, network: ExitNetwork):
        alone = tuple(map(tuple, np.eye(network.num_exits).tolist()))
        super().__init__(network, Policy((NONE_LEAVE,) * network.num_exits, ensemble=alone))
        self._random = random.Random(0)

    def time_blocks(self, images: Tensor) -> tuple[np.ndarray, list[int]]:
        """Return milliseconds (K + 1) of the blocks and of the prediction, and images (K) in each block."""
        self._device, self._marks, self._sizes = images.device, [], []
        self._exponent = self._random.choice((0.3, 3.0, 60.0))  # the larger, the fewer images leave
        self._mark()
        self(images)
        self._mark()
        return 1e3 * np.diff(self._marks), self._sizes

    def _mark(self) -> None:
        wait_for(self._device)
        self._marks.append(time.perf_counter())

    def may_start(self, k: int, num_images: int) -> bool:
        if k > 0:
            self._mark()
        self._sizes.append(num_images)
        return True

    def leaves(self, confidence: Tensor, threshold: float) -> Tensor:
        leaves = super().leaves(confidence, threshold)
        if len(leaves) > 1:
            leaves[: int(len(leaves) * self._random.random() ** self._exponent)] = True
        return leaves

    def finish(self, logits: Sequence[Tensor], exits: Tensor) -> Prediction:
        self._mark()
        return super().finish(logits, exits)


def runtime_rows(
    network: ExitNetwork, points: list[Point], images: Tensor, times: BlockTimes, seconds: float = 30.0
) -> list[dict]:
    """Measure the mean time per image of policies, beside that of running every exit; they take turns.

    Args:
        network: The network that predicts, as for ``measure_blocks``.
        points: Points of a policy curve.
        images: On the device, (N, 3, H, W), as the predictor takes them; as many of them are used as there is
            time for.
        times: Times of this network at the batch size to measure.
        seconds: No further images are started after this time.

    Returns:
        First a row for running every exit (``p`` 0, a plain pass through the network), then one per point:
        ``batch_size``, ``p``, ``milliseconds`` per image, ``expected_milliseconds`` by ``times``, and the
        number of ``images``.
    """
    size, wait = times.batch_size, partial(wait_for, images.device)
    runs = [torch.inference_mode()(network), *(AdaptivePredictor(network, point.policy) for point in points)]
    shares = [(0.0,) * (network.num_exits - 1) + (1.0,), *(point.shares for point in points)]
    spent, count, ends = np.zeros(len(runs)), 0, time.perf_counter() + seconds
    # A data set smaller than a batch is one batch.
    batches = [batch for batch in images.split(size) if len(batch) == size] or [images]
    for i in range(0, len(batches), TURN):
        for j, run in enumerate(runs):
            run(batches[i])  # not counted: the previous run left its own data in the caches
            wait()
            began = time.perf_counter()
            for batch in batches[i : i + TURN]:
                run(batch)
            wait()
            spent[j] += time.perf_counter() - began
        count += sum(map(len, batches[i : i + TURN]))
        if time.perf_counter() > ends:
            break
    return [
        {
            "batch_size": size,
            "p": point.number if point else 0,
            "milliseconds": round(1e3 * total / count, 5),
            "expected_milliseconds": round(times.milliseconds(share), 5),
            "images": count,
        }
        for point, total, share in zip([None, *points], spent, shares, strict=True)
    ]


def distinct(points: tuple[Point, ...], count: int) -> list[Point]:
    """Return at most ``count`` points, equally spaced along the curve, without duplicate shares."""
    different = list({point.shares: point for point in points}.values())
    if len(different) <= count:
        return different
    return [different[round(i * (len(different) - 1) / max(count - 1, 1))] for i in range(count)]
