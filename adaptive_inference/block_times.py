"""Measured time of every block, and the time of a policy that follows from it.

Example:
    times = measure_blocks(network, images[:1], batch_size=64)    # of ``timing``
    times.milliseconds(point.shares)                              # expected per image
    times.reserve(k, 64)                                          # milliseconds that block k rarely exceeds
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class BlockTimes:
    """Measured milliseconds of every block with its exit; the first includes preprocessing and the stem.

    Attributes:
        batch_size: Expected number of images per call.
        sizes: The numbers of images that were timed, for each of K blocks an increasing array (S,).
        usual: Milliseconds at these sizes: medians, scaled so that they add up to the time of all passes.
        high: Milliseconds that nearly all passes stayed within, at these sizes.
        after: Milliseconds from the last block that runs to the prediction: median, and what nearly all
            passes stayed within.
    """

    batch_size: int
    sizes: tuple[np.ndarray, ...]
    usual: tuple[np.ndarray, ...]
    high: tuple[np.ndarray, ...]
    after: tuple[float, float]

    def milliseconds(self, shares: tuple[float, ...]) -> float:
        """Return the expected time per image of a policy, from the share of images leaving at each exit."""
        size = self.batch_size
        numbers = torch.arange(size + 1, device="cpu")
        total, reach = self.after[0], 1.0
        for k, share in enumerate(shares):
            chances = (
                torch.distributions.Binomial(size, torch.tensor(min(max(reach, 0.0), 1.0), device="cpu"))
                .log_prob(numbers)
                .exp()
                .numpy()
            )
            total += float((chances * _at(numbers.numpy(), self.sizes[k], self.usual[k])).sum())
            reach -= share
        return total / size

    def reserve(self, k: int, num_images: int) -> float:
        """Return the milliseconds that block ``k`` and the prediction after it nearly always stay within."""
        sizes, high = self.sizes[k], self.high[k]
        index = int(np.searchsorted(sizes, num_images))
        return self.after[1] + float(high[index] if index < len(sizes) else high[-1] * num_images / sizes[-1])

    def __str__(self) -> str:
        parts = [f"{self.milliseconds((0.0,) * k + (1.0,)):.3g}" for k in range(len(self.sizes))]
        return f"measured at batch {self.batch_size}: {' / '.join(parts)} ms per image to each exit"


def _at(numbers: np.ndarray, sizes: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Interpolate times (S,) at sizes (S,): 0 for no image, proportional beyond the largest size."""
    inside = np.interp(numbers, np.append(0, sizes), np.append(0.0, times))
    # Below the smallest measured size nothing gets cheaper: every kernel is still launched.
    inside = np.where((numbers > 0) & (numbers < sizes[0]), times[0], inside)
    return np.where(numbers > sizes[-1], times[-1] * numbers / sizes[-1], inside)


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
