"""Measured time beside counted operations, over the points of a policy curve.

rows = runtime_rows(network, curve, images)     # images (N, 3, H, W), normalised as in training
write_csv(path, rows)
save_figure(draw_runtime(rows), picture)
"""

import statistics
import time
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from adaptive_inference.policies import Point, PolicyCurve
from adaptive_inference.predictor import AdaptivePredictor


def runtime_rows(
    network: nn.Module,
    curve: PolicyCurve,
    images: Tensor,
    operations: list[int],
    lazy_operations: list[int],
    batch_sizes: tuple[int, ...] = (1, 256),
    points: int = 10,
    repeats: int = 5,
    images_at_batch_1: int = 64,
) -> list[dict]:
    """Time an image at each batch size over a policy curve.

    Args:
        network: best in its ``inference_form``, on the device to measure.
        curve: whose policies are timed, ``points`` of them at equal distances along the curve.
        images: test images on the device, (N, 3, H, W); the same ones serve every point and batch size, at batch 1 the first
            ``images_at_batch_1``.
        operations, lazy_operations: to each exit, by ``count_operations``, published and ``lazy=True``.
        repeats: rounds over all points; medians are reported, so that another program's burst hits one round of each and not one point.

    Returns:
        One row for each batch size and point: ``batch_size``, ``p``, mean ``operations`` and ``lazy_operations`` on these images,
        ``milliseconds`` an image, and ``full_milliseconds``, the time an image of a pass that runs every exit, in the same rounds.
    """
    chosen = _spread(curve.of_rule(None), points)
    rows = []
    for batch_size in batch_sizes:
        batches = images[: images_at_batch_1 if batch_size == 1 else None].split(batch_size)
        predictors = [AdaptivePredictor(network, point.policy) for point in chosen]
        answers = [torch.cat([predictor(batch).exits for batch in batches]).cpu() for predictor in predictors]
        every_exit = torch.inference_mode()(network)
        seconds = interleaved_seconds([_over(batches, run) for run in [every_exit, *predictors]], repeats, images.device)
        per_image = [1e3 * s / sum(map(len, batches)) for s in seconds]
        for point, exits, milliseconds in zip(chosen, answers, per_image[1:], strict=True):
            rows.append(
                {
                    "batch_size": batch_size,
                    "p": point.p,
                    "operations": round(torch.tensor(operations)[exits].double().mean().item()),
                    "lazy_operations": round(torch.tensor(lazy_operations)[exits].double().mean().item()),
                    "milliseconds": round(milliseconds, 5),
                    "full_milliseconds": round(per_image[0], 5),
                }
            )
    return rows


def interleaved_seconds(
    functions: list[Callable[[], object]], repeats: int, device: torch.device, least_seconds: float = 0.0
) -> list[float]:
    """Median seconds of each function over ``repeats`` rounds that call all of them in turn.

    Each measurement follows a call that is not counted: the function before it left its own data in the caches, and perhaps threads that
    still spin.

    Args:
        least_seconds: call a function several times a round until it has run so long.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
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


def draw_runtime(rows: list[dict]) -> Figure:
    """Share of the full time against share of the full operations, a line a batch size."""
    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    most = max(row["operations"] for row in rows) / 1e6
    for batch_size in dict.fromkeys(row["batch_size"] for row in rows):
        line = sorted(
            (row["operations"] / 1e6, row["milliseconds"], row["full_milliseconds"]) for row in rows if row["batch_size"] == batch_size
        )
        share = [100 * milliseconds / full for _, milliseconds, full in line]
        axes.plot(
            [x for x, _, _ in line], share, "o-", markersize=4, label=f"batch {batch_size:.0f}: every exit {line[0][2]:.3g} ms an image"
        )
    axes.set_xlim(0, 1.05 * most)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("operations an image (millions)")
    axes.set_ylabel("measured time (% of running every exit)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _spread(points: tuple[Point, ...], count: int) -> list[Point]:
    if len(points) <= count:
        return list(points)
    return [points[round(i * (len(points) - 1) / max(count - 1, 1))] for i in range(count)]


def _over(batches: tuple[Tensor, ...], function: Callable[[Tensor], object]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            function(batch)

    return run
