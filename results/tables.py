"""The README's result tables, from the CSV files beside this program.

python results/tables.py
"""

import csv
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUDGETS = (1e7, 2e7, 3e7, 4e7, 5e7)  # operations an image

# Top-1 by exit (from 1) of the CIFAR-100 network with 5 exits after the whole schedule: notes on tables 2 and 3 of the paper.
PAPER = {"MSDNet": {2: 63.73, 5: 71.81}, "IMTA": {2: 65.54, 5: 73.45}}


def rows_of(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as stream:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def anytime_table(run: Path) -> str:
    stages = [rows_of(run / stage / "anytime.csv") for stage in ("GE", "IMTA")]
    rows = []
    for ge, imta in zip(*stages, strict=True):
        k = int(ge["exit"])
        paper = [f"{PAPER[name][k]:.2f}" if k in PAPER[name] else "" for name in PAPER]
        rows.append([str(k), f"{ge['operations'] / 1e6:.2f} M", *paper, f"{ge['acc1']:.2f}", f"{imta['acc1']:.2f}"])
    return markdown(["exit", "operations", "paper: MSDNet", "paper: IMTA", "ours: GE", "ours: GE + ISC + OFA"], rows)


def best_within(rows: list[dict[str, float]], operations: float) -> str:
    """Test accuracy of the budget that is best on held-out images among those that spend at most ``operations``."""
    affordable = [row for row in rows if row["operations"] <= operations]
    return f"{max(affordable, key=lambda row: row['val_acc1'])['test_acc1']:.2f}" if affordable else ""


def budgeted_table(run: Path) -> str:
    stages = [rows_of(run / stage / "budgeted.csv") for stage in ("GE", "IMTA")]
    rows = [[f"{budget / 1e6:.0f} M", *(best_within(rows, budget) for rows in stages)] for budget in BUDGETS]
    return markdown(["mean operations at most", "ours: GE", "ours: GE + ISC + OFA"], rows)


def main() -> None:
    run = HERE / "cifar100_short"
    sys.stdout.write("\n\n".join([anytime_table(run), budgeted_table(run)]) + "\n")


if __name__ == "__main__":
    main()
