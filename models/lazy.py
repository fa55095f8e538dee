"""Which cells of MSDNet's feature grid each exit needs ("lazy evaluation" in the MSDNet paper).

An exit reads the coarsest scale only, so the finer scales of a block's last layers are computed only if the
image continues. A *cell* is one scale of one layer of the grid (``GridLayer``): ``(depth, scale)``. The cells
of the stem have depth 0.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from .layers import GridLayer

Cell = tuple[int, int]


class ExitPlan(NamedTuple):
    """The cells on the way to an exit.

    Attributes:
        computed: Cells to compute for this exit, in this order.
        read: The cell that the exit reads.
        kept: All cells that later exits read.
    """

    computed: tuple[Cell, ...]
    read: Cell
    kept: tuple[Cell, ...]


def exit_plans(blocks: Iterable[Sequence[GridLayer]], num_scales: int) -> list[ExitPlan]:
    """Return the plan of every exit of a network with these blocks; an exit follows every block."""
    layers: list[GridLayer] = []
    depths = []
    for block in blocks:
        layers += block
        depths.append(len(layers))
    done: set[Cell] = {(0, scale) for scale in range(num_scales)}
    steps = []  # the cells to compute for an exit, the one it reads, and all that are then done
    for depth in depths:
        read = (depth, num_scales - 1)
        computed = _missing(read, layers, done)
        done = done | computed
        steps.append((computed, read, done))
    plans, read_later = [], set()
    for computed, read, done in reversed(steps):
        plans.append(ExitPlan(tuple(sorted(computed)), read, tuple(sorted(done & read_later))))
        read_later |= {read, *chain.from_iterable(_sources(cell, layers) for cell in computed)}
    return plans[::-1]


def _missing(wanted: Cell, layers: Sequence[GridLayer], done: set[Cell]) -> set[Cell]:
    """Return ``wanted`` and all cells that it depends on, without those that are ``done``."""
    missing, open_cells = set(), [wanted]
    while open_cells:
        cell = open_cells.pop()
        if cell not in done and cell not in missing:
            missing.add(cell)
            open_cells += _sources(cell, layers)
    return missing


def _sources(cell: Cell, layers: Sequence[GridLayer]) -> list[Cell]:
    """Return the cells that a cell is computed from."""
    depth, scale = cell
    return [(depth - 1, source) for source in layers[depth - 1].reads(scale)]
