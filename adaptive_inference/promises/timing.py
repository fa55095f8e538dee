"""Measured time beside counted operations: of blocks, of policies, of answers by a deadline.

    times = measure_blocks(network, images[:1], batch_size=64)    # two seconds
    times.milliseconds(point.shares)                              # an image, expected of a policy
    times.reserve(k, 64)                                          # milliseconds that block and exit k will not exceed

A policy's time is that of its blocks at the batch sizes that occur: of a batch of B, n images reach block k, and n is binomial with the
share of the held-out images that reached it. Blocks are timed inside the predictor, with all it does between them.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_inference.budgeted import NONE_LEAVE
from adaptive_inference.policies import Answer, Point, Policy
from adaptive_inference.predictor import AdaptivePredictor, AnytimePredictor, Prediction, wait_for

MAX_SECONDS = 2.0
RESERVED = 0.998  # share of the measured passes through a block that took no longer than is reserved for it
GROUPS = 5  # of similar sizes, each with a median
DEADLINES = 8
TURN = 8  # batches of a policy, before the next one's


@dataclass(frozen=True)
class BlockTimes:
    """Measured milliseconds of every block with its exit; the first includes what comes before it.

    Args:
        batch_size: that of the calls to expect.
        sizes: numbers of images, (S,) for each of K blocks, growing, on average over similar batches.
        usual, high: milliseconds at these sizes: medians, lifted so that they add up to the time of all passes; and of nearly all passes.
        after: milliseconds from the last block that runs to the answer, usually and in nearly all passes.
    """

    batch_size: int
    sizes: tuple[np.ndarray, ...]
    usual: tuple[np.ndarray, ...]
    high: tuple[np.ndarray, ...]
    after: tuple[float, float]

    def milliseconds(self, shares: tuple[float, ...]) -> float:
        """Expected time an image of a policy that lets these ``shares`` of the images leave at each exit."""
        size = self.batch_size
        numbers = torch.arange(size + 1)
        total, reach = self.after[0], 1.0
        for k, share in enumerate(shares):
            chances = (
                torch.distributions.Binomial(size, torch.tensor(min(max(reach, 0.0), 1.0)))
                .log_prob(numbers)
                .exp()
                .numpy()
            )
            total += float((chances * _at(numbers.numpy(), self.sizes[k], self.usual[k])).sum())
            reach -= share
        return total / size

    def reserve(self, k: int, num_images: int) -> float:
        """Milliseconds within which block k (0-based) and the answer nearly always end, for so many images."""
        sizes, high = self.sizes[k], self.high[k]
        index = int(np.searchsorted(sizes, num_images))
        return self.after[1] + float(high[index] if index < len(sizes) else high[-1] * num_images / sizes[-1])

    def __str__(self) -> str:
        parts = [f"{self.milliseconds((0.0,) * k + (1.0,)):.3g}" for k in range(len(self.sizes))]
        return f"measured at batch {self.batch_size}: {' / '.join(parts)} ms an image to each exit"


def _at(numbers: np.ndarray, sizes: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Times for these numbers of images: none for none, straight lines between the measured sizes, proportional beyond them."""
    inside = np.interp(numbers, np.append(0, sizes), np.append(0.0, times))
    # Even one image costs every call of a kernel; below the smallest measured size nothing gets cheaper.
    inside = np.where((numbers > 0) & (numbers < sizes[0]), times[0], inside)
    return np.where(numbers > sizes[-1], times[-1] * numbers / sizes[-1], inside)


def measure_blocks(
    network: nn.Module, images: Tensor, batch_size: int = 1, seconds: float = MAX_SECONDS
) -> BlockTimes:
    """Time every block for the batches that occur when images leave one of ``batch_size``: warm, medians.

    Args:
        network: in the form and on the device that will answer.
        images: at least one (n, 3, H, W), as the predictor takes them; what they show makes no difference.
        seconds: limit for everything. A batch that would exceed it is taken to cost in proportion to a smaller one.
    """
    ends = time.perf_counter() + seconds
    watch = _Stopwatch(network)
    size, batch = 1, images[:1].contiguous()
    watch(batch)
    spans, sizes = watch(batch)
    while size < batch_size and 8e-3 * spans.sum() < ends - time.perf_counter():
        size = min(2 * size, batch_size)
        batch = images[:1].expand(size, -1, -1, -1).contiguous()
        spans, sizes = watch(batch)
    passes = [(spans, sizes)]
    while time.perf_counter() < ends:
        passes.append(watch(batch))
    spans, sizes = (np.array(values).T for values in zip(*passes, strict=True))
    columns, usual = [], 0.0
    for span, number in zip(
        spans, [*sizes, np.full_like(sizes[0], batch_size)], strict=True
    ):  # the last span is that of the answer
        by_size: dict[float, list[float]] = {}
        for group in np.array_split(np.argsort(number, kind="stable"), GROUPS):
            if len(group):
                by_size.setdefault(float(np.median(number[group])), []).extend(span[group])
        medians, high = (np.array([of(values) for values in by_size.values()]) for of in (np.median, _high))
        usual += sum(median * len(values) for median, values in zip(medians, by_size.values(), strict=True))
        columns.append((np.array(list(by_size)), medians, high))
    # A promise is about means, which interruptions lift above medians.
    columns = [(size, medians * spans.sum() / usual, high) for size, medians, high in columns]
    *blocks, (_, answer, answer_high) = columns
    return BlockTimes(batch_size, *zip(*blocks, strict=True), (float(answer[-1]), float(answer_high[-1])))


def _high(values: np.ndarray) -> np.ndarray:
    return np.quantile(values, RESERVED)


class _Stopwatch(AdaptivePredictor):
    """Gives the milliseconds (K + 1) of all blocks and of the answer, and the images (K) in each block. Of several images some leave at
    every exit, by chance, in some passes most, in some hardly any: all sizes occur, and none is new to the libraries afterwards."""

    def __init__(self, network: nn.Module):
        super().__init__(
            network,
            Policy(
                (NONE_LEAVE,) * network.num_exits,
                ensemble=tuple(map(tuple, np.eye(network.num_exits).tolist())),
            ),
        )
        self._chance = random.Random(0)

    def __call__(self, images: Tensor) -> tuple[np.ndarray, list[int]]:
        self._device, self._marks, self._sizes = images.device, [], []
        self._rareness = self._chance.choice((0.3, 3.0, 60.0))
        super().__call__(images)
        self._mark()
        return 1e3 * np.diff(self._marks), self._sizes

    def _mark(self) -> None:
        wait_for(self._device)
        self._marks.append(time.perf_counter())

    def _checked(self, images: Tensor) -> Tensor:
        self._mark()
        return super()._checked(images)

    def _may_start(self, k: int, num_images: int) -> bool:
        if k > 0:
            self._mark()
        self._sizes.append(num_images)
        return True

    def _answer(self, logits: Sequence[Tensor], exits: Tensor) -> Prediction:
        self._mark()
        return super()._answer(logits, exits)

    def _leaves(self, answer: Answer, threshold: float) -> Tensor:
        leaves = super()._leaves(answer, threshold)
        if len(leaves) > 1:
            leaves[: int(len(leaves) * self._chance.random() ** self._rareness)] = True
        return leaves


def runtime_rows(
    network: nn.Module, points: list[Point], images: Tensor, times: BlockTimes, seconds: float = 30.0
) -> list[dict]:
    """Mean time an image of policies at the batch size of ``times``, beside that of running every exit; they take turns.

    Args:
        points: to time, of a policy curve.
        images: on the device, (N, 3, H, W), as the predictor takes them; as many of them as there is time for.
        seconds: after which no further images are begun.

    Returns:
        First a row for running every exit (``p`` 0, in a plain pass over the network), then one a point: ``batch_size``, ``p``,
        ``milliseconds`` an image, ``expected_milliseconds`` by ``times``, and the number of ``images``.
    """
    size, wait = times.batch_size, partial(wait_for, images.device)
    runs = [torch.inference_mode()(network), *(AdaptivePredictor(network, point.policy) for point in points)]
    shares = [(0.0,) * (network.num_exits - 1) + (1.0,), *(point.shares for point in points)]
    spent, count, ends = np.zeros(len(runs)), 0, time.perf_counter() + seconds
    batches = [batch for batch in images.split(size) if len(batch) == size] or [
        images
    ]  # of a small data set, all at once
    for i in range(0, len(batches), TURN):
        for j, run in enumerate(runs):
            run(batches[i])  # not counted: the one before left its own data in the caches
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
            "p": point.p if point else 0,
            "milliseconds": round(1e3 * total / count, 5),
            "expected_milliseconds": round(times.milliseconds(share), 5),
            "images": count,
        }
        for point, total, share in zip([None, *points], spent, shares, strict=True)
    ]


def deadline_rows(
    network: nn.Module,
    images: Tensor,
    times: BlockTimes,
    acc1: list[float],
    policy: Policy | None = None,
    calls: int = 500,
) -> list[dict]:
    """Answers by deadlines from that of the first exit to that of the last, one image at a time.

    Args:
        images: (N, 3, H, W), as the predictor takes them.
        times: at batch 1.
        acc1: of every exit. Time alone decides which exit answers, so its accuracy is that over all images.
        policy: as for ``AnytimePredictor``.
        calls: for every deadline.

    Returns:
        A row a deadline: ``milliseconds``, ``acc1`` in percent, ``late`` (share of the calls that took longer), ``share_k`` of the calls
        that exit k answered.
    """
    first = 1.02 * times.reserve(0, 1)
    last = max(
        1.1 * sum(usual[0] for usual in times.usual[:-1]) + times.reserve(network.num_exits - 1, 1), first
    )
    rows, wait = [], partial(wait_for, images.device)
    for deadline in np.linspace(first, last, DEADLINES).tolist():
        predictor, late, exits = AnytimePredictor(network, deadline, times, policy), 0, []
        for call in range(calls):
            image = images[call % len(images)][None]
            wait()
            began = time.perf_counter()
            prediction = predictor(image)
            wait()
            late += 1e3 * (time.perf_counter() - began) > deadline
            exits.append(prediction.exits)
        shares = (torch.bincount(torch.cat(exits).cpu(), minlength=network.num_exits) / calls).tolist()
        reached = sum(share * accuracy for share, accuracy in zip(shares, acc1, strict=True))
        by_exit = {f"share_{k}": round(share, 4) for k, share in enumerate(shares, start=1)}
        rows.append(
            {"milliseconds": round(deadline, 4), "acc1": round(reached, 4), "late": late / calls, **by_exit}
        )
    return rows


def distinct(points: tuple[Point, ...], count: int) -> list[Point]:
    """At most ``count`` points at equal distances along the curve, leaving out those that let the same images leave."""
    different = list({point.shares: point for point in points}.values())
    if len(different) <= count:
        return different
    return [different[round(i * (len(different) - 1) / max(count - 1, 1))] for i in range(count)]
