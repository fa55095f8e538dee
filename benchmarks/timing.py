"""Times that can be compared: functions run in turn, so that another program slows all of them alike."""

import math
import statistics
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

LEAST_SECONDS = 0.2  # of one measurement


def median_seconds(
    functions: dict[str, Callable[[], object]], rounds: int, least: float = LEAST_SECONDS
) -> dict[str, float]:
    """Return the median seconds of one call of each function.

    Args:
        functions: The functions to measure, by name.
        rounds: Number of rounds, each of which measures every function once.
        least: Seconds that a measurement takes about, by repeating the function.
    """
    threads = torch.get_num_threads()
    timers = {
        name: Timer("function()", globals={"function": function}, num_threads=threads)
        for name, function in functions.items()
    }
    counts = {name: math.ceil(least / timer.timeit(1).mean) for name, timer in timers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(counts[name]).mean)
    return {name: statistics.median(values) for name, values in seconds.items()}
