"""Exit-by-exit evaluation of a network, computing only what each exit reads (MSDNet paper, lazy evaluation in section 5).

run = Stepwise(network, images)
first = run.next_logits()      # (N, C), exit 1
run.keep(uncertain)            # a boolean mask or indices: the images that go on
second = run.next_logits()     # (n, C), exit 2, of those images only
"""

import functools

from torch import Tensor, nn

from models.imta import IMTA
from models.layers import Layer

# (number of stages passed, scale) -> features (n, channels, H, W); the stem's are 0 stages deep.
Cells = dict[tuple[int, int], Tensor]


class Stepwise:
    """One pass over the exits of an ``MSDNet`` or ``IMTA`` network for a batch that may shrink between exits.

    Args:
        network: in evaluation mode; BatchNorm over a shrinking batch would otherwise change what later exits see. A network that has a
            function ``advance`` of its own, such as a compiled one, is evaluated with that.
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
        self.lazy = lazy
        self.exits_done = 0
        self._advance = getattr(network, "advance", advance)
        self._previous_logits: Tensor | None = None
        self._cells = stem_cells(network, images)

    def next_logits(self) -> Tensor:
        """Logits (n, C) of the next exit for the images still here.

        Raises:
            IndexError: all exits are done.
        """
        if self.exits_done == self.network.num_exits:
            raise IndexError(f"all {self.network.num_exits} exits are done")
        self._previous_logits, self._cells = self._advance(self.network, self.exits_done, self._cells, self._previous_logits, self.lazy)
        self.exits_done += 1
        return self._previous_logits

    def keep(self, images: Tensor) -> None:
        """Carry on with these of the present images: a boolean mask (n,) or indices.

        Indices are the better choice on a GPU: a mask makes the host wait for the number of images, once for every tensor kept.
        """
        self._cells = {key: x[images] for key, x in self._cells.items()}
        if self._previous_logits is not None:
            self._previous_logits = self._previous_logits[images]


def stem_cells(network: nn.Module, images: Tensor) -> Cells:
    """What the first block reads: the stem's features of ``images`` (N, 3, H, W), by scale."""
    return {(0, scale): x for scale, x in _trunk(network).stem(images).items()}


def advance(network: nn.Module, k: int, cells: Cells, previous_logits: Tensor | None, lazy: bool) -> tuple[Tensor, Cells]:
    """Compute block and exit ``k`` (0-based); nothing but the arguments is read, and nothing changed.

    Args:
        cells: features that were computed before and are still needed.
        previous_logits: (n, C) of exit k - 1, None for the first exit.
        lazy: as for ``Stepwise``.

    Returns:
        Logits (n, C) of the exit, and the features that later exits still need.
    """
    trunk = _trunk(network)
    stages = [stage for block in trunk.blocks for stage in block]
    depth = sum(len(block) for block in trunk.blocks[: k + 1])
    coarsest = trunk.num_scales - 1
    computed, kept = _plan(tuple((stage.scales, isinstance(stage, Layer)) for stage in stages), depth, tuple(cells), lazy)
    cells = dict(cells)
    for cell_depth, scale in computed:
        below = cell_depth - 1
        cells[cell_depth, scale] = stages[below].compute(scale, lambda s, below=below: cells[below, s])
    logits = network.classify_next(k, trunk.exits[k].features(cells[depth, coarsest]), previous_logits)
    return logits, {key: cells[key] for key in kept}


@functools.lru_cache(maxsize=1024)  # planning would cost more time than a small convolution
def _plan(
    stages: tuple[tuple[range, bool], ...], depth: int, present: tuple[tuple[int, int], ...], lazy: bool
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Cells to compute, in order, for an exit after ``depth`` stages, and those to keep then.

    Args:
        stages: the scales of every stage, and whether a cell of it also reads the next finer scale of the stage before.
        present: cells that were computed before.
    """
    computed: dict[tuple[int, int], None] = dict.fromkeys(present)

    def need(depth: int, scale: int) -> None:
        if (depth, scale) in computed:
            return
        reads_finer = stages[depth - 1][1]
        for source in (scale, scale - 1) if reads_finer else (scale,):
            if depth > 1 and source in stages[depth - 2][0]:
                need(depth - 1, source)
        computed[depth, scale] = None

    def has_waiting_reader(depth: int, scale: int) -> bool:
        if depth == len(stages):
            return False
        scales, reads_finer = stages[depth]
        readers = (scale, scale + 1) if reads_finer else (scale,)
        return any(s in scales and (depth + 1, s) not in computed for s in readers)

    scales = stages[depth - 1][0]
    for scale in scales[-1:] if lazy else scales:
        need(depth, scale)
    # Features whose every reader has been computed are forgotten, so that leaving images out copies no more than needed.
    return list(computed)[len(present) :], [cell for cell in computed if has_waiting_reader(*cell)]


def _trunk(network: nn.Module) -> nn.Module:
    return network.backbone if isinstance(network, IMTA) else network
