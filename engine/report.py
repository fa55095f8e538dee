"""Results for people: tables on the terminal, CSV files, pictures of accuracy against operations and time."""

import csv
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaptive_inference.budgeted import ExitPredictions, evaluate_thresholds
from adaptive_inference.calibration import MANY_IMAGES
from adaptive_inference.policies import Point, Policy
from utils import UserError, atomic_write, percent, print_error

if TYPE_CHECKING:
    from engine.run_directory import RunDirectory

LARGEST_NUMBER = 1e15  # operations have fewer digits
ERROR_BARS_BELOW = 1_000  # test images: with fewer, accuracies are drawn as points with error bars
SHOWN_STEP = 4  # the table of budgets shows the policies 4, 8, ... 40
# Titles of the columns of a run's files, and of percentages made of them, on the terminal.
TITLES = {
    "p": "policy",
    "batch_size": "batch",
    "lazy_operations": "lazy",
    "share_of_operations": "% of full",
    "milliseconds": "ms per image",
    "expected_milliseconds": "expected ms",
    "share_of_time": "% of full time",
    "acc1": "top-1 %",
    "test_acc1": "top-1 %",
    "acc5": "top-5 %",
    "ece": "calibration error %",
    "ece_scaled": "with temperature",
    "ensemble_acc1": "ensemble top-1 %",
}
PERCENTAGES = ("acc1", "test_acc1", "acc5", "ece", "ece_scaled", "ensemble_acc1")
LEGENDS = {
    "operations": "operations: multiply-adds, linear biases, activations, pooling and additions per image, "
    "as the published plots count them",
    "lazy_operations": "lazy: those that predict.py needs, which computes only what the next exit reads",
    "ece": "calibration error: mean distance between confidence and accuracy",
    "ece_scaled": "with temperature: the same after dividing each exit's logits by its temperature",
    "ensemble_acc1": "ensemble: prediction from all exits so far",
    "expected_milliseconds": "expected: from the times of single blocks",
}


def table(rows: Sequence[dict], names: Sequence[str], num_images: int | None = None) -> str:
    """Return rows as text: right-aligned columns, a rule below their titles, and a legend.

    Args:
        rows: Rows of numbers or text.
        names: Columns to show; columns that the rows lack are left out.
        num_images: Number of images behind the percentages, which decides how many digits are shown.
    """
    names = [name for name in names if name in rows[0]]
    cells = [
        [TITLES.get(name, name) for name in names],
        *([_shown(name, row[name], num_images) for name in names] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    legends = [LEGENDS[name] for name in names if name in LEGENDS]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *(f"({legend})" for legend in legends)])


def _shown(name: str, value: float | str, num_images: int | None) -> str:
    if name in ("operations", "lazy_operations"):
        return millions(value)
    if not isinstance(value, float):
        return str(value)
    if name in PERCENTAGES:
        return percent(value, num_images)
    digits = 0 if name.startswith("share") else 3 if name.endswith("milliseconds") else 2
    return f"{value:.{digits}f}"


def millions(*operations: float) -> str:
    """Return operations as ``7.94 M``, several as ``1.92 / 5.27 / 7.94 M``."""
    return " / ".join(f"{number / 1e6:.2f}" for number in operations) + " M"


def budget_rows(points: Sequence[Point], test: ExitPredictions, operations: Sequence[float]) -> list[dict]:
    """Return the rows of ``budgeted.csv``: points, and what their policies reach on test images.

    Args:
        points: Points of one rule.
        test: Predictions for the test images.
        operations: Operations to each exit.

    Returns:
        ``p``; ``val_operations`` and ``operations``, means on held-out and on test images; ``val_acc1``,
        ``test_acc1``; ``share_k`` of the test images that leave at exit k = 1 .. K, and ``threshold_k``.
    """
    rows = []
    for point in points:
        thresholds = point.policy.thresholds
        result = evaluate_thresholds(torch.tensor(thresholds, dtype=test.confidence.dtype), test, operations)
        row = {
            "p": point.number,
            "val_operations": round(point.operations),
            "operations": round(result.operations),
        }
        row |= {"val_acc1": round(point.val_acc1, 4), "test_acc1": round(result.acc1, 4)}
        row |= {f"share_{k}": round(share, 6) for k, share in enumerate(result.shares, start=1)}
        row |= {f"threshold_{k}": threshold for k, threshold in enumerate(thresholds, start=1)}
        rows.append(row)
    return rows


def budget_table(
    geometric: list[dict], optimised: list[dict], ensemble: list[dict], full: int, num_images: int
) -> str:
    """Return every fourth policy of each of the three rules as a table, without duplicates.

    Args:
        geometric: Rows of ``budgeted.csv``.
        optimised: Rows of ``optimised.csv``.
        ensemble: Rows of ``ensemble.csv``.
        full: Operations of the full network.
        num_images: Number of test images.
    """
    others = {"optimised rule": optimised, "ensemble of exits": ensemble}
    if ensemble == optimised:
        del others["ensemble of exits"]
    num_exits = sum(name.startswith("share_") for name in geometric[0])
    exits = [f"exit {k} %" for k in range(1, num_exits + 1)]
    different: dict[tuple, dict] = {}
    for i in range(SHOWN_STEP - 1, len(geometric), SHOWN_STEP):
        row = geometric[i]
        line = {**row, "share_of_operations": 100 * row["operations"] / full}
        for k, title in enumerate(exits, start=1):
            line[title] = f"{100 * row[f'share_{k}']:.0f}"
        for title, rows in others.items():
            accuracy, share = percent(rows[i]["test_acc1"], num_images), 100 * rows[i]["operations"] / full
            line[title] = f"{accuracy} at {share:.0f} %"
        different.setdefault(tuple(line[name] for name in ("operations", "test_acc1", *exits, *others)), line)
    rows = list(different.values())
    names = ("p", "operations", "share_of_operations", "test_acc1", *exits, *others)
    legend = (
        f"(policy: of {len(geometric)}, from 1 for the cheapest; "
        "exit k %: share of the images that leave there; "
        + "".join(f"{title}: top-1 % at % of the full operations; " for title in others)
        + f"{num_images:,} test images)"
    )
    return f"{table(rows, names, num_images)}\n{legend}"


def runtime_table(rows: list[dict], num_images: int) -> str:
    """Return rows of ``timing.runtime_rows`` as a table; the first is that of running every exit."""
    full, shown = rows[0], []
    for row in rows:
        shares = {
            "share_of_operations": 100 * row["operations"] / full["operations"],
            "share_of_time": 100 * row["milliseconds"] / full["milliseconds"],
        }
        shown.append({**row, "p": row["p"] or "every exit", **shares})
    names = ("batch_size", "p", "operations", "lazy_operations", "share_of_operations", "milliseconds")
    return table(shown, (*names, "expected_milliseconds", "share_of_time", "acc1"), num_images)


def deadline_table(rows: list[dict], num_images: int) -> str:
    """Return rows of ``promises.deadlines.deadline_rows`` as a table."""
    shown = [
        {"deadline ms": row["milliseconds"], "acc1": row["acc1"], "late %": 100 * row["late"]} for row in rows
    ]
    return table(shown, list(shown[0]), num_images)


def temperature_line(policy: Policy, num_images: int) -> str:
    """Return a line about the temperatures and the number of held-out images they rest on."""
    temperatures = " / ".join(f"{temperature:.2f}" for temperature in policy.temperatures)
    few = "" if num_images >= MANY_IMAGES else ", few: none is set below 1, and confidences are uncertain"
    return f"temperatures of the exits {temperatures}, fitted on {num_images:,} held-out images{few}"


def best_within(rows: Sequence[dict], operations: float) -> dict | None:
    """Return the row of ``budgeted.csv`` that is best on held-out images within a budget.

    Test images choose nothing: the budget is compared with the mean operations on held-out images.

    Args:
        rows: Rows of ``budget_rows``.
        operations: The budget, a mean per image.

    Returns:
        The row, None if all of them spend more.
    """
    affordable = [row for row in rows if row["val_operations"] <= operations]
    return max(affordable, key=lambda row: row["val_acc1"], default=None)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows with the same keys."""
    with atomic_write(path) as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path, columns: Sequence[str] = ()) -> list[dict]:
    """Return rows of numbers that ``write_csv`` wrote.

    Args:
        path: The CSV file.
        columns: Names that every row must have.

    Raises:
        UserError: The file is damaged.
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


def known_curves(runs: "dict[str, RunDirectory]") -> dict[str, tuple[list[dict], list[dict], list[dict]]]:
    """Return rows of the anytime, budgeted and optimised files of runs, by title."""
    curves = {}
    for title, directory in runs.items():
        columns = {
            directory.anytime: "acc1",
            directory.budgeted: "test_acc1",
            directory.optimised: "test_acc1",
        }
        try:
            rows = tuple(
                read_csv(path, ("operations", name)) if path.exists() else []
                for path, name in columns.items()
            )
        except UserError as error:  # an old table is no reason to stop, after new ones were written
            print_error(f"{error}; the curves of {title} are left out")
            continue
        if any(rows):
            curves[title] = rows
    return curves


def draw_curves(
    runs: dict[str, tuple[list[dict], list[dict], list[dict]]], num_images: int | None = None
) -> Figure:
    """Draw accuracy against operations.

    Args:
        runs: Name -> rows of ``anytime.csv``, ``budgeted.csv`` and ``optimised.csv`` (each may be empty).
            Exits are circles; budgets are a line for the paper's rule and a dotted one for the optimised
            rule.
        num_images: Number of test images. Where there are few, budgets are points with error bars of one
            standard error, as lines between them would show little but chance.
    """
    figure = Figure(figsize=(6.4, 5.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    few = num_images if num_images is not None and num_images < ERROR_BARS_BELOW else None
    for i, (name, (anytime, budgeted, optimised)) in enumerate(runs.items()):
        curves = (
            (budgeted, "test_acc1", "s" if few else "-", f"{name}: budgeted"),
            (optimised, "test_acc1", "^" if few else ":", f"{name}: budgeted, optimised rule"),
            (anytime, "acc1", "o" if few else "o--", f"{name}: each exit"),
        )
        for rows, accuracy, style, label in curves:
            _draw(axes, rows, "operations", accuracy, f"C{i}{style}", label, few)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")  # outside it covers no point
    return figure


def draw_runtime(budgets: list[dict], exits: list[dict], deadlines: list[dict]) -> Figure:
    """Draw accuracy against operations, and against milliseconds at batch 1.

    Args:
        budgets: Rows of policies, with ``acc1``, ``operations`` and ``milliseconds``.
        exits: Rows of every exit, with ``acc1`` and ``operations``.
        deadlines: Rows with ``acc1`` and ``milliseconds``.
    """
    figure = Figure(figsize=(9.6, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, budgets, "operations", "acc1", "C0-", "budget (mean over images)")
    _draw(left, exits, "operations", "acc1", "C1o--", "each exit for all images")
    _draw(right, budgets, "milliseconds", "acc1", "C0-", "")
    _draw(right, deadlines, "milliseconds", "acc1", "C2s--", "deadline (for every image)")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.label_outer()
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _draw(
    axes: Axes,
    rows: list[dict],
    cost: str,
    accuracy: str,
    style: str,
    label: str,
    num_images: int | None = None,
) -> None:
    """Draw these columns of ``rows``, if there are any; with error bars if ``num_images`` is given."""
    axes.set_xlabel(
        "operations per image (millions)" if cost == "operations" else "milliseconds per image, one at a time"
    )
    axes.set_ylabel("top-1 accuracy on the test set (%)")
    axes.grid(visible=True, alpha=0.3)
    if not rows:
        return
    unit = 1e6 if cost == "operations" else 1
    points = sorted({(row[cost] / unit, row[accuracy]) for row in rows})
    costs, accuracies = zip(*points, strict=True)
    look = {"linewidth": 1.2, "markersize": 5, "alpha": 0.85, "label": label or None}
    if num_images is None:
        axes.plot(costs, accuracies, style, **look)
        return
    errors = [math.sqrt(value * (100 - value) / num_images) for value in accuracies]
    axes.errorbar(costs, accuracies, yerr=errors, fmt=style, elinewidth=0.8, **look)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG. Letters that the font lacks, such as Chinese ones, are boxes in it."""
    with atomic_write(path, "wb") as stream, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="png", metadata={"Software": None})
