"""The result tables of the project's README and the plots beside them, from the CSV files in this folder.

python -m results.tables            # prints the tables
python -m results.tables --write    # puts them into README.md, between their markers, and draws the plots again
"""

import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from engine.collect import accuracy_at
from engine.report import draw_curves, read_csv, save_figure
from results.arms import SCHEDULES
from utils import CommandLineParser, atomic_write

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
SHORT = HERE / "cifar100_short"
ARM_RESULTS, PUBLISHED_RESULTS = (SCHEDULES[name].results for name in ("short", "published"))
BUDGETS = (1e7, 2e7, 3e7, 4e7, 5e7)  # operations an image
NUM_EXITS = 5

# Top-1 by exit (from 1) of the CIFAR-100 network with 5 exits after the whole schedule: notes on tables 2 and 3 of the paper.
PAPER = {"MSDNet": {2: 63.73, 5: 71.81}, "IMTA": {2: 65.54, 5: 73.45}}
# The same network, plain MSDNet, budgeted prediction by mean operations: Liuyang829/testMSDNet.
REPORT_BUDGETED = ((7.2e6, 59.1), (11.6e6, 63.9), (17.2e6, 67.3), (27.2e6, 69.8))
# The network with 7 exits, read off a figure: arXiv 2306.02652.
REPORT_7 = {"MSDNet": (65.3, 68.3, 70.8, 72.3, 72.6, 72.8, 72.8), "IMTA": (62.0, 67.6, 69.2, 70.5, 71.5, 72.4, 72.7)}

# Columns on all classes: arms of the published schedule, and the runs of ``SHORT`` by folder.
WHOLE_ARMS = {
    "MSDNet": "300 epochs: MSDNet",
    "GE": "300 epochs: GE",
    "GE_ISC_OFA": "300 + 180 epochs: GE + ISC + OFA",
}
SHORT_RUNS = {"GE": "6 epochs: GE", "IMTA": "6 + 3 epochs: GE + ISC + OFA"}
OURS = [f"ours, {run}" for run in (*WHOLE_ARMS.values(), *SHORT_RUNS.values())]

ARM_TITLES = {
    "MSDNet": "MSDNet",
    "GE": "GE",
    "GE_ISC": "GE + ISC",
    "GE_OFA": "GE + OFA",
    "GE_ISC_OFA": "GE + ISC + OFA",
    "GE_ISC_OFA_T4": "GE + ISC + OFA, T = 4, gamma = 0.5",
    "GE_classifiers": "GE, new classifiers alone",
    "GE_ISC_OFA_kl_mean": "GE + ISC + OFA, `--kl mean`",
    "GE_ISC_OFA_flow": "GE + ISC + OFA, `--isc-gradient flow`",
    "GE_ISC_OFA_moving": "GE + ISC + OFA, `--backbone-bn moving`",
    "released_GE": "GE, released way (`--ge-scales coarsest`)",
    "released_IMTA": "GE + ISC + OFA, released way",
    "GE_he": "GE, `--init he`",
    "GE_multistep": "GE, `--lr-type multistep`",
    "GE_batch_64": "GE, batch 64, lr 0.1, multistep",
    "GE_plain_engine": "GE, fast settings off",
}
ARM_TITLES_7 = {"MSDNet_7": "MSDNet", "GE_7": "GE", "GE_ISC_OFA_7": "GE + ISC + OFA"}
NUM_EXITS_7 = 7
BUDGETED_ARMS = ("MSDNet", "GE", "GE_ISC", "GE_OFA", "GE_ISC_OFA", "released_IMTA")
DIFFERENCES = (
    ("MSDNet", "GE"),
    ("GE", "GE_ISC_OFA"),
    ("GE", "GE_classifiers"),
    ("GE_classifiers", "GE_ISC"),
    ("GE_classifiers", "GE_OFA"),
    ("GE_ISC_OFA", "GE_ISC_OFA_T4"),
    ("GE_ISC_OFA", "GE_ISC_OFA_kl_mean"),
    ("GE_ISC_OFA", "GE_ISC_OFA_flow"),
    ("GE_ISC_OFA", "GE_ISC_OFA_moving"),
    ("released_GE", "released_IMTA"),
    ("GE", "released_GE"),
    ("GE_ISC_OFA", "released_IMTA"),
    ("GE", "GE_he"),
    ("GE", "GE_multistep"),
    ("GE", "GE_plain_engine"),
)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: list[float], sign: str = "") -> str:
    """Mean +- sample standard deviation, and how many values there are if not three."""
    if not values:
        return ""
    count = "" if len(values) == 3 else f" (n = {len(values)})"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}{count}"


def seeds_of(arm: str, results: Path = ARM_RESULTS) -> list[Path]:
    """Folders of the seeds an arm was run with."""
    return sorted(path.parent for path in results.glob(f"seed_*/{arm}/anytime.csv"))


def exit_accuracies(folder: Path) -> list[float]:
    return [row["acc1"] for row in read_csv(folder / "anytime.csv")]


def budget_accuracies(folder: Path, file: str) -> list[float]:
    """Test accuracy of the budget that is best on held-out images among those that spend at most each of ``BUDGETS``."""
    rows = read_csv(folder / file)
    return [accuracy_at(rows, budget)["test_acc1"] for budget in BUDGETS]


def spread_columns(rows: list[list[float]], sign: str = "") -> list[str]:
    return [spread(list(column), sign) for column in zip(*rows, strict=True)]


def exit_names(count: int) -> list[str]:
    return [f"exit {k}" for k in range(1, count + 1)]


def whole_schedule(accuracies: Callable[[Path], list[float]], count: int) -> list[list[str]]:
    """``count`` rows, a column for every arm on the published schedule, over its seeds; blank where it has not been run."""
    columns = [spread_columns([accuracies(folder) for folder in seeds_of(arm, PUBLISHED_RESULTS)]) for arm in WHOLE_ARMS]
    return [list(row) for row in zip(*(column or [""] * count for column in columns), strict=True)]


def short_table() -> str:
    stages = [read_csv(SHORT / stage / "anytime.csv") for stage in SHORT_RUNS]
    rows = []
    for whole, *exits in zip(whole_schedule(exit_accuracies, NUM_EXITS), *stages, strict=True):
        k = int(exits[0]["exit"])
        paper = [f"{PAPER[name][k]:.2f}" if k in PAPER[name] else "" for name in PAPER]
        operations = f"{exits[0]['operations'] / 1e6:.2f} M"
        rows.append([str(k), operations, *paper, *whole, *(f"{row['acc1']:.2f}" for row in exits)])
    return markdown(["exit", "operations", "paper: MSDNet", "paper: IMTA", *OURS], rows)


def short_budget_table() -> str:
    accuracies_at_budgets = partial(budget_accuracies, file="budgeted.csv")
    stages = [accuracies_at_budgets(SHORT / stage) for stage in SHORT_RUNS]
    rows = []
    for budget, whole, *accuracies in zip(BUDGETS, whole_schedule(accuracies_at_budgets, len(BUDGETS)), *stages, strict=True):
        reported = [f"{accuracy:.1f} at {spent / 1e6:.1f} M" for spent, accuracy in REPORT_BUDGETED if budget - 1e7 < spent <= budget]
        rows.append([f"{budget / 1e6:.0f} M", ", ".join(reported), *whole, *(f"{accuracy:.2f}" for accuracy in accuracies)])
    return markdown(["mean operations at most", "report: MSDNet", *OURS], rows)


def arms_table(titles: dict[str, str] = ARM_TITLES, num_exits: int = NUM_EXITS) -> str:
    rows = []
    for arm, title in titles.items():
        if columns := spread_columns([exit_accuracies(folder) for folder in seeds_of(arm)]):
            rows.append([title, *columns])
    return markdown(["arm", *exit_names(num_exits)], rows)


def report_7_table() -> str:
    """The network with 7 exits on all classes: what others report and, where it has been run, ours."""
    rows = [[f"report: {name}", *(f"{accuracy:.1f}" for accuracy in accuracies)] for name, accuracies in REPORT_7.items()]
    for arm, title in ARM_TITLES_7.items():
        columns = spread_columns([exit_accuracies(folder) for folder in seeds_of(arm, PUBLISHED_RESULTS)])
        rows.append([f"ours: {title}", *(columns or [""] * NUM_EXITS_7)])
    return markdown(["100 classes, published schedule", *exit_names(NUM_EXITS_7)], rows)


def arms_budget_table() -> str:
    rows = []
    for arm in BUDGETED_ARMS:
        for file, rule in (("budgeted.csv", ""), ("optimised.csv", ", optimised thresholds")):
            if seeds := seeds_of(arm):
                rows.append([ARM_TITLES[arm] + rule, *spread_columns([budget_accuracies(folder, file) for folder in seeds])])
    return markdown(["arm", *(f"{budget / 1e6:.0f} M" for budget in BUDGETS)], rows)


def rules_table() -> str:
    """Optimised thresholds less those of the paper's rule, over all runs of arms with this network."""
    differences = []
    for folder in (folder for arm in ARM_TITLES for folder in seeds_of(arm)):
        optimised, geometric = (budget_accuracies(folder, file) for file in ("optimised.csv", "budgeted.csv"))
        gain = [a - b for a, b in zip(optimised, geometric, strict=True)]
        differences.append([*gain, statistics.mean(gain)])
    columns = spread_columns(differences, "+")
    return markdown(["difference", *(f"{budget / 1e6:.0f} M" for budget in BUDGETS), "mean"], [["optimised less paper's rule", *columns]])


def gains(before: str, after: str) -> list[list[float]]:
    """By seed, what ``after`` gains on ``before`` with the same seed, and so the same order of images: every exit, then their mean."""
    pairs = [(folder, folder.parent / before) for folder in seeds_of(after) if (folder.parent / before / "anytime.csv").exists()]
    by_exit = [[a - b for a, b in zip(*map(exit_accuracies, pair), strict=True)] for pair in pairs]
    return [[*gain, statistics.mean(gain)] for gain in by_exit]


def differences_table() -> str:
    rows = []
    for before, after in DIFFERENCES:
        if columns := spread_columns(gains(before, after), "+"):
            rows.append([f"{ARM_TITLES[after]} less {ARM_TITLES[before]}", *columns])
    return markdown(["difference", *exit_names(NUM_EXITS), "mean of exits"], rows)


def effect(before: str, after: str) -> str:
    """Mean over exits of what ``after`` gains on ``before``."""
    return spread([gain[-1] for gain in gains(before, after)], "+")


def draw_arms() -> Figure:
    """Mean over seeds of every arm's exits (points) and budgets (lines), with the standard deviation as a band."""
    figure = Figure(figsize=(6.8, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for arm in ("MSDNet", "GE", "GE_ISC_OFA"):
        seeds = seeds_of(arm)
        if not seeds:
            continue
        tables = [read_csv(folder / "anytime.csv") for folder in seeds]
        operations = [row["operations"] / 1e6 for row in tables[0]]
        columns = list(zip(*([row["acc1"] for row in rows] for rows in tables), strict=True))
        means = [statistics.mean(column) for column in columns]
        (line,) = axes.plot(operations, means, "o--", markersize=5, linewidth=1.2, label=f"{ARM_TITLES[arm]}: each exit")
        if len(seeds) > 1:
            widths = [statistics.stdev(column) for column in columns]
            low, high = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
            axes.fill_between(operations, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        curves = [read_csv(folder / "budgeted.csv") for folder in seeds]
        points = [
            (statistics.mean(r["operations"] for r in rows) / 1e6, statistics.mean(r["test_acc1"] for r in rows))
            for rows in zip(*curves, strict=True)
        ]
        axes.plot(*zip(*sorted(points), strict=True), "-", color=line.get_color(), linewidth=1.2, label=f"{ARM_TITLES[arm]}: budgeted")
    axes.set_xlabel("operations an image (millions)")
    axes.set_ylabel("top-1 accuracy on the test set (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    return figure


def draw_short() -> Figure:
    """The runs on all classes."""
    files = ("anytime.csv", "budgeted.csv", "optimised.csv")
    return draw_curves({title: tuple(read_csv(SHORT / run / file) for file in files) for run, title in SHORT_RUNS.items()})


TABLES = {
    "short": short_table,
    "short-budgets": short_budget_table,
    "arms": arms_table,
    "arms-7-exits": partial(arms_table, ARM_TITLES_7, NUM_EXITS_7),
    "report-7-exits": report_7_table,
    "arms-budgets": arms_budget_table,
    "arms-differences": differences_table,
    "arms-rules": rules_table,
}


def with_tables(text: str) -> str:
    """``text`` with its tables and effects: between ``<!-- table NAME -->`` or ``<!-- effect BEFORE AFTER -->`` and ``<!-- end -->``."""
    text = re.sub(
        r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text, flags=re.DOTALL
    )
    return re.sub(
        r"(<!-- effect (\S+) (\S+) -->).*?(<!-- end -->)", lambda match: f"{match[1]}{effect(match[2], match[3])}{match[4]}", text
    )


def main() -> None:
    parser = CommandLineParser(prog="results.tables", description="Print the result tables, or write them and the plots anew.")
    parser.add_argument("--write", action="store_true", help="into README.md and the pictures")
    if parser.parse_args().write:
        text = with_tables(README.read_text(encoding="utf-8"))
        with atomic_write(README) as stream:
            stream.write(text)
        save_figure(draw_arms(), ARM_RESULTS / "arms.png")
        save_figure(draw_short(), SHORT / "curves.png")
    else:
        sys.stdout.write("\n\n".join(f"{name}\n\n{make()}" for name, make in TABLES.items()) + "\n")


if __name__ == "__main__":
    main()
