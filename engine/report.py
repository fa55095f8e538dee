"""Results as people read them: tables on the terminal, CSV files, one picture of accuracy against operations."""

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from utils import UserError, atomic_write

LARGEST_NUMBER = 1e15  # operations have fewer digits
COLORS = ("tab:blue", "tab:red", "tab:green", "tab:orange")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns under a header and a rule."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def millions(*operations: float) -> str:
    """As ``7.94 M``, several as ``1.92 / 5.27 / 7.94 M``."""
    return " / ".join(f"{number / 1e6:.2f}" for number in operations) + " M"


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows of the same keys."""
    with atomic_write(path) as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path, columns: Sequence[str] = ()) -> list[dict]:
    """Rows of numbers that ``write_csv`` wrote.

    Args:
        columns: names that every row must have.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
        for row in rows:
            if not all(abs(value) <= LARGEST_NUMBER for value in row.values()):
                raise ValueError("a number is out of range")
            if not row.keys() >= set(columns):
                raise ValueError(f"a column is missing: {', '.join(sorted(set(columns) - row.keys()))}")
        return rows
    except (OSError, ValueError, TypeError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged ({reason}); write it again with --evalmode") from None


def draw_curves(runs: dict[str, tuple[list[dict], list[dict], list[dict]]]) -> Figure:
    """Accuracy against operations.

    Args:
        runs: name -> rows of ``anytime.csv``, ``budgeted.csv`` and ``optimised.csv`` (each may be empty): exits are points, budgets of
            the paper's rule a line, those of the optimised rule a dotted one.
    """
    figure = Figure(figsize=(6.4, 5.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (name, (anytime, budgeted, optimised)), color in zip(runs.items(), COLORS, strict=False):
        lines = [
            ([(row["operations"] / 1e6, row["test_acc1"]) for row in budgeted], "-", f"{name}: budgeted"),
            ([(row["operations"] / 1e6, row["test_acc1"]) for row in optimised], ":", f"{name}: budgeted, optimised rule"),
            ([(row["operations"] / 1e6, row["acc1"]) for row in anytime], "o--", f"{name}: each exit"),
        ]
        for points, style, label in lines:
            if points:
                axes.plot(*zip(*sorted(points), strict=True), style, color=color, linewidth=1.2, markersize=5, alpha=0.85, label=label)
    axes.set_xlabel("operations an image (millions)")
    axes.set_ylabel("top-1 accuracy on the test set (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")  # outside it hides no point
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png", metadata={"Software": None})
