"""Exit-by-exit evaluation of a network, computing only what each exit reads (MSDNet paper, lazy evaluation in section 5).

run = Stepwise(network, images)
first = run.next_logits()      # (N, C), exit 1
run.keep(uncertain)            # a boolean mask or indices: the images that go on
second = run.next_logits()     # (n, C), exit 2, of those images only
"""

import torch
from torch import Tensor, nn

from models.imta import IMTA


class Stepwise:
    """One pass over the exits of an ``MSDNet`` or ``IMTA`` network for a batch that may shrink between exits.

    Args:
        network: in evaluation mode; BatchNorm over a shrinking batch would otherwise change what later exits see.
        images: (N, 3, H, W).
        lazy: compute a scale of a layer only when an exit depends on it. An exit reads the coarsest scale only, so the finer scales of
            a block's last layers wait until an image goes on. False computes whole blocks, as published operation counts assume.

    Raises:
        ValueError: the network is in training mode.
    """

    def __init__(self, network: nn.Module, images: Tensor, lazy: bool = True):
        if network.training:
            raise ValueError("stepwise evaluation needs a network in evaluation mode: call network.eval() first")
        self.network = network
        self.trunk = network.backbone if isinstance(network, IMTA) else network
        self.lazy = lazy
        self.exits_done = 0
        self._previous_logits: Tensor | None = None
        self._stages = [stage for block in self.trunk.blocks for stage in block]
        self._block_ends = torch.tensor([len(block) for block in self.trunk.blocks]).cumsum(0).tolist()
        # (number of stages passed, scale) -> features; the stem's are 0 stages deep.
        self._cells = {(0, scale): x for scale, x in self.trunk.stem(images).items()}

    def next_logits(self) -> Tensor:
        """Logits (n, C) of the next exit for the images still here.

        Raises:
            IndexError: all exits are done.
        """
        if self.exits_done == self.network.num_exits:
            raise IndexError(f"all {self.network.num_exits} exits are done")
        k = self.exits_done
        depth = self._block_ends[k]
        scales = [self.trunk.num_scales - 1] if self.lazy else self._stages[depth - 1].scales
        for scale in scales:
            self._cell(depth, scale)
        features = self.trunk.exits[k].features(self._cells[depth, self.trunk.num_scales - 1])
        self._previous_logits = self.network.classify_next(k, features, self._previous_logits)
        self.exits_done += 1
        self._drop_spent_cells()
        return self._previous_logits

    def keep(self, images: Tensor) -> None:
        """Carry on with these of the present images: a boolean mask (n,) or indices."""
        self._cells = {key: x[images] for key, x in self._cells.items()}
        if self._previous_logits is not None:
            self._previous_logits = self._previous_logits[images]

    def _cell(self, depth: int, scale: int) -> Tensor:
        if (depth, scale) not in self._cells:
            stage = self._stages[depth - 1]
            self._cells[depth, scale] = stage.compute(scale, lambda s: self._cell(depth - 1, s))
        return self._cells[depth, scale]

    def _drop_spent_cells(self) -> None:
        """Forget features whose every reader has been computed, so that ``keep`` copies no more than needed."""

        def has_waiting_reader(depth: int, scale: int) -> bool:
            if depth == len(self._stages):
                return False
            readers = self._stages[depth].scales
            return any(s in readers and (depth + 1, s) not in self._cells for s in (scale, scale + 1))

        spent = [key for key in self._cells if not has_waiting_reader(*key)]
        for key in spent:
            del self._cells[key]
