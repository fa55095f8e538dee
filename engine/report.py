"""Results as people read them: tables on the terminal, CSV files, one picture of accuracy against operations."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaptive_inference.budgeted import ExitPredictions, evaluate_thresholds
from adaptive_inference.policies import Point
from utils import UserError, atomic_write

LARGEST_NUMBER = 1e15  # operations have fewer digits
# Of the columns of a run's files, and of percentages made of them, on the terminal.
TITLES = {
    "batch_size": "batch",
    "lazy_operations": "evaluated lazily",
    "share_of_operations": "% of full",
    "milliseconds": "ms an image",
    "expected_milliseconds": "expected",
    "share_of_time": "% of full time",
    "acc1": "top-1 %",
    "test_acc1": "top-1 %",
    "acc5": "top-5 %",
    "ece": "ECE %",
    "ece_scaled": "ECE % scaled",
    "ensemble_acc1": "ensemble top-1 %",
}


def table(rows: Sequence[dict], names: Sequence[str]) -> str:
    """The columns of these names, as far as there are such, right-aligned under their titles and a rule."""
    names = [name for name in names if name in rows[0]]
    cells = [
        [TITLES.get(name, name) for name in names],
        *([_shown(name, row[name]) for name in names] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _shown(name: str, value: float | str) -> str:
    if name in ("operations", "lazy_operations"):
        return millions(value)
    if isinstance(value, float):
        return f"{value:.{0 if name.startswith('share') else 3 if name.endswith('milliseconds') else 2}f}"
    return str(value)


def millions(*operations: float) -> str:
    """As ``7.94 M``, several as ``1.92 / 5.27 / 7.94 M``."""
    return " / ".join(f"{number / 1e6:.2f}" for number in operations) + " M"


def budget_rows(points: Sequence[Point], test: ExitPredictions, operations: Sequence[float]) -> list[dict]:
    """Return the rows of ``budgeted.csv``: points, and what their policies reach on test images.

    Args:
        points: of one rule.
        test: predictions for the test images.
        operations: to each exit.

    Returns:
        ``p``; ``val_operations`` and ``operations``, means on held-out and on test images; ``val_acc1``, ``test_acc1``;
        ``share_k`` of the test images that leave at exit k = 1 .. K, and ``threshold_k``.
    """
    rows = []
    for point in points:
        thresholds = point.policy.thresholds
        result = evaluate_thresholds(torch.tensor(thresholds, dtype=test.confidence.dtype), test, operations)
        row = {
            "p": point.p,
            "val_operations": round(point.operations),
            "operations": round(result.operations),
        }
        row |= {"val_acc1": round(point.val_acc1, 4), "test_acc1": round(result.acc1, 4)}
        row |= {f"share_{k}": round(share, 6) for k, share in enumerate(result.shares, start=1)}
        row |= {f"threshold_{k}": threshold for k, threshold in enumerate(thresholds, start=1)}
        rows.append(row)
    return rows


def best_within(rows: Sequence[dict], operations: float) -> dict | None:
    """Return the row of ``budgeted.csv`` that is best on held-out images within a budget.

    Test images choose nothing: the budget is compared with the mean operations on held-out images.

    Args:
        rows: of ``budget_rows``.
        operations: the budget, a mean per image.

    Returns:
        The row, None if all of them spend more.
    """
    affordable = [row for row in rows if row.get("val_operations", row["operations"]) <= operations]
    return max(affordable, key=lambda row: row["val_acc1"], default=None)


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
    for i, (name, (anytime, budgeted, optimised)) in enumerate(runs.items()):
        _draw(axes, budgeted, "operations", "test_acc1", f"C{i}-", f"{name}: budgeted")
        _draw(axes, optimised, "operations", "test_acc1", f"C{i}:", f"{name}: budgeted, optimised rule")
        _draw(axes, anytime, "operations", "acc1", f"C{i}o--", f"{name}: each exit")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")  # outside it hides no point
    return figure


def draw_runtime(budgets: list[dict], exits: list[dict], deadlines: list[dict]) -> Figure:
    """Accuracy against operations, and against milliseconds at batch 1; rows have ``acc1`` and ``operations``, ``milliseconds`` or both.

    Args:
        budgets: of policies.
        exits: of every exit, of operations alone.
        deadlines: of time alone.
    """
    figure = Figure(figsize=(9.6, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, budgets, "operations", "acc1", "-", "budget (mean over images)")
    _draw(left, exits, "operations", "acc1", "o--", "each exit for all images")
    _draw(right, budgets, "milliseconds", "acc1", "-", "budget (mean over images)")
    _draw(right, deadlines, "milliseconds", "acc1", "o--", "deadline (for every image)")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.legend(loc="lower right", fontsize="small")
        axes.label_outer()
    return figure


def _draw(axes: Axes, rows: list[dict], cost: str, accuracy: str, style: str, label: str) -> None:
    """A line through these columns of ``rows``, if there are any."""
    unit = 1e6 if cost == "operations" else 1
    if rows:
        points = sorted((row[cost] / unit, row[accuracy]) for row in rows)
        axes.plot(*zip(*points, strict=True), style, linewidth=1.2, markersize=5, alpha=0.85, label=label)
    axes.set_xlabel(
        "operations an image (millions)" if cost == "operations" else "milliseconds an image, one at a time"
    )
    axes.set_ylabel("top-1 accuracy on the test set (%)")
    axes.grid(visible=True, alpha=0.3)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png", metadata={"Software": None})
