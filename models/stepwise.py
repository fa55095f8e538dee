"""Exit-by-exit evaluation of a network, computing only what each exit reads (MSDNet paper, lazy evaluation in section 5).

run = Stepwise(network, images)
first = run.next_logits()      # (N, C), exit 1
run.keep(uncertain)            # a boolean mask or indices: the images that go on
second = run.next_logits()     # (n, C), exit 2, of those images only
"""

import functools
from typing import NamedTuple

from torch import Tensor, nn

from models.layers import Layer

Cell = tuple[int, int]  # (number of stages passed, scale); the stem's are 0 stages deep
Cells = dict[Cell, Tensor]  # features (n, channels, H, W)


class ExitPlan(NamedTuple):
    """What block and exit ``k`` (0-based) compute: ``computed`` in this order, of which and of earlier cells ``kept`` are needed later.
    The exit reads ``read``."""

    k: int
    read: Cell
    computed: tuple[Cell, ...]
    kept: tuple[Cell, ...]


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
            raise ValueError(
                "stepwise evaluation needs a network in evaluation mode: call network.eval() first"
            )
        self.network = network
        self.exits_done = 0
        self._plans = exit_plans(network, lazy)
        self._previous_logits: Tensor | None = None
        self._cells = stem_cells(network, images)

    def next_logits(self) -> Tensor:
        """Logits (n, C) of the next exit for the images still here.

        Raises:
            IndexError: all exits are done.
        """
        if self.exits_done == len(self._plans):
            raise IndexError(f"all {self.exits_done} exits are done")
        plan = self._plans[self.exits_done]
        self._previous_logits, self._cells = advance(self.network, plan, self._cells, self._previous_logits)
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
    return {(0, scale): x for scale, x in network.trunk.stem(images).items()}


def advance(
    network: nn.Module, plan: ExitPlan, cells: Cells, previous_logits: Tensor | None
) -> tuple[Tensor, Cells]:
    """Compute a block and its exit; nothing but the arguments is read, and nothing changed.

    Args:
        plan: of this exit.
        cells: features that were computed before and are still needed.
        previous_logits: (n, C) of the exit before, None for the first exit.

    Returns:
        Logits (n, C) of the exit, and the features that later exits still need.
    """
    trunk = network.trunk
    stages = [stage for block in trunk.blocks for stage in block]
    cells = dict(cells)
    for depth, scale in plan.computed:
        cells[depth, scale] = stages[depth - 1].compute(scale, lambda s, below=depth - 1: cells[below, s])
    logits = network.classify_next(plan.k, trunk.exits[plan.k].features(cells[plan.read]), previous_logits)
    return logits, {key: cells[key] for key in plan.kept}


def exit_plans(network: nn.Module, lazy: bool) -> tuple[ExitPlan, ...]:
    """The plan of every exit; ``lazy`` as for ``Stepwise``."""
    trunk = network.trunk
    depths, stages = [], []
    for block in trunk.blocks:
        stages += [(stage.scales, isinstance(stage, Layer)) for stage in block]
        depths.append(len(stages))
    return _plans(tuple(stages), tuple(depths), trunk.num_scales, lazy)


@functools.lru_cache(maxsize=64)  # planning would cost more time than a small network
def _plans(
    stages: tuple[tuple[range, bool], ...], depths: tuple[int, ...], num_scales: int, lazy: bool
) -> tuple[ExitPlan, ...]:
    """See ``exit_plans``.

    Args:
        stages: the scales of every stage, and whether a cell of it also reads the next finer scale of the stage before.
        depths: stages passed before every exit.
    """
    computed: dict[Cell, None] = dict.fromkeys((0, scale) for scale in range(num_scales))

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

    plans = []
    for k, depth in enumerate(depths):
        before = len(computed)
        scales = stages[depth - 1][0]
        for scale in scales[-1:] if lazy else scales:
            need(depth, scale)
        # Features whose every reader has been computed are forgotten, so that leaving images out copies no more than needed.
        kept = tuple(cell for cell in computed if has_waiting_reader(*cell))
        plans.append(ExitPlan(k, (depth, num_scales - 1), tuple(computed)[before:], kept))
    return tuple(plans)
