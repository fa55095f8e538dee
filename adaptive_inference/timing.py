"""Measured time beside counted operations: of blocks, of policies, of answers by a deadline.

    times = measure_blocks(network, images[:1], batch_size=64)    # two seconds
    times.milliseconds(point.shares)                              # an image, expected of a policy
    times.reserve(k, 64)                                          # milliseconds that block and exit k will not exceed

A policy's time is that of its blocks at the batch sizes that occur: of a batch of B, n images reach block k, and n is binomial with the
share of the held-out images that reached it. Blocks are timed inside the predictor, with all it does between them.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from adaptive_inference.budgeted import ALL_LEAVE, NONE_LEAVE
from adaptive_inference.policies import Answer, Point, Policy
from adaptive_inference.predictor import AdaptivePredictor, AnytimePredictor, simulate

MAX_SECONDS = 2.0
RESERVED = 0.998  # share of the measured passes through a block that took no longer than is reserved for it
GROUPS = 5  # of similar sizes, each with a median
AFTERS = 200
DEADLINES = 8


@dataclass(frozen=True)
class BlockTimes:
    """Measured milliseconds of every block with its exit; the first includes what comes before it.

    Args:
        batch_size: that of the calls to expect.
        sizes: numbers of images, (S,) for each of K blocks, growing, on average over similar batches.
        median, high: milliseconds at these sizes, in the middle and of nearly all passes.
        after: milliseconds from the last block that runs to the answer, in the middle and of nearly all passes.
    """

    batch_size: int
    sizes: tuple[np.ndarray, ...]
    median: tuple[np.ndarray, ...]
    high: tuple[np.ndarray, ...]
    after: tuple[float, float]

    def milliseconds(self, shares: tuple[float, ...], batch_size: int | None = None) -> float:
        """Expected time an image of a policy that lets these ``shares`` of the images leave at each exit."""
        size = batch_size or self.batch_size
        numbers = torch.arange(size + 1)
        total, reach = self.after[0], 1.0
        for k, share in enumerate(shares):
            chances = torch.distributions.Binomial(size, torch.tensor(min(max(reach, 0.0), 1.0))).log_prob(numbers).exp().numpy()
            total += float((chances * _at(numbers.numpy(), self.sizes[k], self.median[k])).sum())
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


def measure_blocks(network: nn.Module, images: Tensor, batch_size: int = 1, seconds: float = MAX_SECONDS) -> BlockTimes:
    """Time every block for the batches that occur when images leave one of ``batch_size``: warm, medians.

    Args:
        network: in the form and on the device that will answer.
        images: at least one (n, 3, H, W), as the predictor takes them; what they show makes no difference.
        seconds: limit for everything. A batch that would exceed it is taken to cost in proportion to a smaller one.
    """
    began = time.perf_counter()
    watch = _Stopwatch(network)
    after = _after(network, batch_size, images.device)
    size, batch = 1, images[:1].contiguous()
    for _ in range(2):
        watch(batch)
    while size < batch_size:
        left = 1e3 * (began + seconds - time.perf_counter())
        if 8 * watch.marks[-1] > left:
            break
        size = min(2 * size, batch_size)
        batch = images[:1].expand(size, -1, -1, -1).contiguous()
        watch(batch)
    spans, sizes = [], []
    while len(spans) < 1 or time.perf_counter() - began < seconds:
        watch(batch)
        spans.append(np.diff(watch.marks))
        sizes.append(watch.sizes)
    columns = []
    for k, (span, number) in enumerate(zip(np.array(spans).T, np.array(sizes).T, strict=True)):
        span = span - after[0] if k == network.num_exits - 1 else span
        groups = [group for group in np.array_split(np.argsort(number, kind="stable"), 1 if number.max() == 1 else GROUPS) if len(group)]
        by_size = {float(np.median(number[group])): span[group] for group in groups}
        medians, high = ([f(values) for values in by_size.values()] for f in (np.median, lambda values: np.quantile(values, RESERVED)))
        columns.append((np.array(list(by_size)), np.array(medians), np.array(high)))
    return BlockTimes(batch_size, *zip(*columns, strict=True), after)


def _after(network: nn.Module, num_images: int, device: torch.device) -> tuple[float, float]:
    """Milliseconds from logits to the answer, in the middle and of nearly all times."""
    policy, wait = Policy((ALL_LEAVE,), temperatures=(1.0,)), _waiting(device)
    logits = torch.zeros(1, num_images, network.num_classes, device=device)
    spans = []
    for _ in range(AFTERS):
        wait()
        began = time.perf_counter()
        simulate(logits, policy)
        wait()
        spans.append(1e3 * (time.perf_counter() - began))
    return float(np.median(spans)), float(np.quantile(spans, RESERVED))


class _Stopwatch(AdaptivePredictor):
    """Leaves ``marks`` (K + 1) in milliseconds: the call, the starts of all blocks but the first, the end; and ``sizes`` (K), the images in
    each block. Of several images some leave at every exit, by chance: all sizes occur, and none is new to the libraries afterwards."""

    def __init__(self, network: nn.Module):
        super().__init__(network, Policy((NONE_LEAVE,) * network.num_exits))
        self.marks: list[float] = []
        self.sizes: list[int] = []
        self._chance = random.Random(0)

    def __call__(self, images: Tensor) -> None:
        self._wait, self._began = _waiting(images.device), time.perf_counter()
        self.marks, self.sizes = [], []
        super().__call__(images)
        self._mark()
        self.marks[0] = 0.0

    def _mark(self) -> None:
        self._wait()
        self.marks.append(1e3 * (time.perf_counter() - self._began))

    def _may_start(self, k: int, num_images: int) -> bool:
        self._mark()
        self.sizes.append(num_images)
        return True

    def _leaves(self, answer: Answer, threshold: float) -> Tensor:
        leaves = super()._leaves(answer, threshold)
        if len(leaves) > 1:
            leaves[: int(len(leaves) * self._chance.random() ** 3)] = True
        return leaves


def interleaved_seconds(
    functions: list[Callable[[], object]], repeats: int, device: torch.device, least_seconds: float = 0.0
) -> list[float]:
    """Median seconds of each function over ``repeats`` rounds that call all of them in turn.

    Each measurement follows a call that is not counted: the function before it left its own data in the caches, and perhaps threads that
    still spin.

    Args:
        least_seconds: call a function several times a round until it has run so long.
    """
    wait = _waiting(device)
    counts = []
    for function in functions:
        function()
        wait()
        began = time.perf_counter()
        function()
        wait()
        counts.append(max(1, round(least_seconds / max(time.perf_counter() - began, 1e-9))))
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, count, measured in zip(functions, counts, seconds, strict=True):
            function()
            wait()
            began = time.perf_counter()
            for _ in range(count):
                function()
            wait()
            measured.append((time.perf_counter() - began) / count)
    return [statistics.median(measured) for measured in seconds]


def runtime_rows(
    network: nn.Module,
    points: list[Point],
    images: Tensor,
    times: BlockTimes,
    seconds: float = 10.0,
) -> list[dict]:
    """Time an image of policies at the batch size of ``times``, beside that of running every exit.

    Args:
        points: to time, of a policy curve.
        images: on the device, (N, 3, H, W), as the predictor takes them; as many of them as there is time for.
        seconds: for everything, about.

    Returns:
        First a row for running every exit (``p`` 0, in a plain pass over the network), then one a point: ``batch_size``, ``p``,
        ``milliseconds`` an image, and ``expected_milliseconds`` by ``times``.
    """
    everything = (0.0,) * (network.num_exits - 1) + (1.0,)
    expected = [times.milliseconds(shares) for shares in (everything, *(point.shares for point in points))]
    repeats = 3
    affordable = seconds / (2 * repeats * sum(expected) / 1e3)  # each round calls everything twice
    count = max(times.batch_size, min(len(images), int(affordable)))
    batches = images[: count // times.batch_size * times.batch_size].split(times.batch_size)
    predictors = [AdaptivePredictor(network, point.policy) for point in points]
    measured = interleaved_seconds([_over(batches, run) for run in [torch.inference_mode()(network), *predictors]], repeats, images.device)
    return [
        {
            "batch_size": times.batch_size,
            "p": point.p if point else 0,
            "milliseconds": round(1e3 * s / sum(map(len, batches)), 5),
            "expected_milliseconds": round(e, 5),
        }
        for point, s, e in zip([None, *points], measured, expected, strict=True)
    ]


def deadline_rows(network: nn.Module, images: Tensor, times: BlockTimes, acc1: list[float], calls: int = 200) -> list[dict]:
    """Answers by deadlines from that of the first exit to that of the last, one image at a time.

    Args:
        images: (N, 3, H, W), as the predictor takes them.
        times: at batch 1.
        acc1: of every exit. Time alone decides which exit answers, so its accuracy is that over all images.
        calls: for every deadline.

    Returns:
        A row a deadline: ``deadline_milliseconds``, ``acc1`` in percent, ``late`` (share of the calls that took longer), ``share_k`` of
        the calls that exit k answered.
    """
    before_last = sum(median[0] for median in times.median[:-1])
    first = 1.02 * times.reserve(0, 1)
    last = max(1.1 * before_last + times.reserve(network.num_exits - 1, 1), first)
    rows = []
    for deadline in np.linspace(first, last, DEADLINES).tolist():
        predictor = AnytimePredictor(network, deadline, times)
        wait, late, exits = _waiting(images.device), 0, []
        for call in range(calls):
            image = images[call % len(images)][None]
            wait()
            began = time.perf_counter()
            prediction = predictor(image)
            wait()
            late += 1e3 * (time.perf_counter() - began) > deadline
            exits.append(prediction.exits)
        shares = torch.bincount(torch.cat(exits).cpu(), minlength=network.num_exits) / calls
        reached = float((shares.double() * torch.tensor(acc1, dtype=torch.float64)).sum())
        by_exit = {f"share_{k}": round(share, 4) for k, share in enumerate(shares.tolist(), start=1)}
        rows.append({"deadline_milliseconds": round(deadline, 4), "acc1": round(reached, 4), "late": late / calls, **by_exit})
    return rows


def draw_runtime(rows: list[dict], deadlines: list[dict], exits: list[dict]) -> Figure:
    """Accuracy against operations, and against milliseconds at batch 1.

    Args:
        rows: of ``runtime.csv``: ``batch_size``, ``p``, ``operations``, ``milliseconds``, ``acc1``.
        deadlines: of ``deadline_rows``.
        exits: ``operations`` and ``acc1`` of every exit.
    """
    figure = Figure(figsize=(9.6, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    single = sorted((row for row in rows if row["batch_size"] == 1 and row["p"] > 0), key=lambda row: row["milliseconds"])
    left.plot([row["operations"] / 1e6 for row in single], [row["acc1"] for row in single], "-", label="budget (mean over images)")
    left.plot(
        [row["operations"] / 1e6 for row in exits], [row["acc1"] for row in exits], "o--", markersize=4, label="each exit for all images"
    )
    left.set_xlabel("operations an image (millions)")
    left.set_ylabel("top-1 accuracy on the test set (%)")
    right.plot([row["milliseconds"] for row in single], [row["acc1"] for row in single], "-", label="budget (mean over images)")
    steps = ([row["deadline_milliseconds"] for row in deadlines], [row["acc1"] for row in deadlines])
    right.plot(*steps, "o--", markersize=4, label="deadline (for every image)")
    right.set_xlabel("milliseconds an image, one at a time")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize="small")
    return figure


def distinct(points: tuple[Point, ...], count: int) -> list[Point]:
    """At most ``count`` points at equal distances along the curve, leaving out those that let the same images leave."""
    different = list({point.shares: point for point in points}.values())
    if len(different) <= count:
        return different
    return [different[round(i * (len(different) - 1) / max(count - 1, 1))] for i in range(count)]


def _waiting(device: torch.device) -> Callable[[], object]:
    """A function that waits until the device has done what it was given."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def _over(batches: tuple[Tensor, ...], function: Callable[[Tensor], object]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            function(batch)

    return run
