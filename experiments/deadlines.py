"""Show how predictions by a deadline follow a machine that becomes slower, and how soon they recover.

    python -m experiments.deadlines

Time is simulated, so that the result is the same on every machine: every block of the shipped network takes 9
of the 10 milliseconds that are reserved for it, and several times as long during 50 calls in between. The
deadline leaves just enough time for the last exit.
"""

import os

# Before PyTorch loads; train_GE.py says why.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys

import numpy as np
import torch

from adaptive_inference.block_times import BlockTimes
from adaptive_inference.promises.deadlines import AnytimePredictor
from engine.report import table
from models import load
from parsing import CommandLineParser

USUAL, RESERVED = 9.0, 10.0  # milliseconds per block
NUM_SLOW, NUM_QUICK = 50, 300  # calls
SLOWNESS = (1.5, 3.0, 10.0, 100.0)


class SimulatedClock:
    """A clock on which ``milliseconds`` pass whenever a classifier runs."""

    def __init__(self, network: torch.nn.Module):
        self.milliseconds, self.now = USUAL, 0.0
        for module in network.modules():
            if isinstance(module, torch.nn.Linear) and module.out_features == network.num_classes:
                module.register_forward_pre_hook(self._advance)

    def _advance(self, *_) -> None:
        self.now += self.milliseconds

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now / 1e3


def recovery_row(name: str, slowness: float) -> dict:
    """Run quick, slow and quick calls, and count late calls and calls until the last exit predicts again."""
    network = load(name)
    clock, num_exits = SimulatedClock(network), network.num_exits
    one, times = np.array([1]), np.array([USUAL])
    blocks = ((one,) * num_exits, (times,) * num_exits, (np.array([RESERVED]),) * num_exits)
    deadline = USUAL * num_exits + 2 * (RESERVED - USUAL)
    predictor = AnytimePredictor(network, deadline, BlockTimes(1, *blocks, (0.0, 0.0)), clock=clock)
    size = network.description.data.image_size
    image = torch.zeros(1, 3, size, size)

    def call() -> tuple[int, bool]:
        began = clock.now
        number = predictor(image).exits.item() + 1
        return number, clock.now - began > deadline

    first_exit, _ = call()
    clock.milliseconds = slowness * USUAL
    slow = [call() for _ in range(NUM_SLOW)]
    clock.milliseconds = USUAL
    quick = [call()[0] for _ in range(NUM_QUICK)]
    return {
        "slower by": slowness,
        "exit before": first_exit,
        "exit in slow calls": slow[-1][0],
        "late slow calls after later blocks": sum(late for number, late in slow if number > 1),
        "quick calls until the last exit": quick.index(num_exits) + 1,
    }


def main() -> None:
    """Print one row per slowness."""
    CommandLineParser(prog="experiments.deadlines", description=__doc__.splitlines()[0]).parse_args()
    rows = [recovery_row("imta_cifar100", slowness) for slowness in SLOWNESS]
    sys.stdout.write(f"{NUM_SLOW} slow calls, then quick ones\n{table(rows, list(rows[0]))}\n")


if __name__ == "__main__":
    main()
