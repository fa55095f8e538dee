"""Result tables of README.md and results/README.md, and figures, from the CSV files in results/.

python -m experiments.tables            # print the tables
python -m experiments.tables --write    # put them into both files, and draw the figures
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from engine.report import best_within, draw_curves, read_csv, save_figure
from experiments import backbones
from experiments.arms import ARMS, MAIN_ARMS, SCHEDULES, seeds_of
from experiments.markdown import markdown_table, spread
from parsing import CommandLineParser
from utils import UserError, atomic_write, print_error

Accuracies = Callable[[Path], list[float]]  # of the folder of a run's results, in percent

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "results" / "README.md")
# The longest first; those of all classes, then all that are compared with what others report.
FULL_SCHEDULES = ("published", "100_epochs", "30_epochs")
COMPARED_SCHEDULES = (*FULL_SCHEDULES, "short")
BUDGET = 28e6  # mean operations per image, of the summary
BUDGETS = (1e7, 2e7, 3e7, 4e7, 5e7)  # operations per image

# Top-1 by exit of the CIFAR-100 network with 5 exits: notes on tables 2 and 3 of the paper.
PAPER = {"MSDNet": ("", "63.73", "", "", "71.81"), "IMTA": ("", "65.54", "", "", "73.45")}
# The same network, plain MSDNet, budgeted prediction, by mean operations: Liuyang829/testMSDNet.
REPORT_BUDGETED = (
    "59.1 at 7.2 M",
    "63.9 at 11.6 M, 67.3 at 17.2 M",
    "69.8 at 27.2 M",
    "",
    "70.4 at its peak",
)
# Small static networks, one for each budget: chenyaofo/pytorch-cifar-models, last epoch of its logs (200
# epochs, no images held out).
STATIC = (
    ("ShuffleNetV2 x0.5", 11.0, 67.45),
    ("MobileNetV2 x0.5", 28.1, 70.19),
    ("MobileNetV2 x0.75", 59.4, 73.58),
)
# A network with 7 exits and growth rate 6, read off a figure: arXiv 2306.02652.
REPORT_7 = {
    "MSDNet": (65.3, 68.3, 70.8, 72.3, 72.6, 72.8, 72.8),
    "IMTA": (62.0, 67.6, 69.2, 70.5, 71.5, 72.4, 72.7),
}

TITLES = {name: arm.title for name, arm in ARMS.items() if not name.endswith("_7")}
# Not arms of the paper; shown beside its arms because they gain most.
BOOSTED, BOOSTED_STAGE_2, BOOSTED_CONTROL = "GE_boosted", "GE_boosted_ISC_OFA", "GE_boosted_classifiers"
BUDGETED_ARMS = (*MAIN_ARMS, "GE_ISC", "GE_OFA", "released_IMTA")
# (an arm, the arm whose gain on it is shown). In stage 2 both start from the same network of stage 1.
STAGE_1_VARIANTS = ("GE_plain_engine", "released_GE", "GE_he", "GE_multistep", "GE_10_epochs", "GE_bf16")
DIFFERENCES_1 = (("MSDNet", "GE"), *(("GE", arm) for arm in STAGE_1_VARIANTS))
DIFFERENCES_ON_GE = (
    ("GE", "GE_ISC_OFA"),
    ("GE", "GE_classifiers"),
    ("GE_classifiers", "GE_ISC"),
    ("GE_classifiers", "GE_OFA"),
    ("GE_ISC", "GE_ISC_OFA"),
    *(("GE_ISC_OFA", f"GE_ISC_OFA_{variant}") for variant in ("T4", "kl_mean", "flow", "moving")),
)
DIFFERENCES_2 = (*DIFFERENCES_ON_GE, ("released_GE", "released_IMTA"), ("GE_ISC_OFA", "GE_ISC_OFA_bf16"))
DIFFERENCES_ALL_CLASSES = (
    ("MSDNet", "GE"),
    *DIFFERENCES_ON_GE,
    ("GE", BOOSTED),
    ("GE_ISC_OFA", BOOSTED),
)
DIFFERENCES_ON_BOOSTED = (
    (BOOSTED, BOOSTED_STAGE_2),
    (BOOSTED, BOOSTED_CONTROL),
    (BOOSTED_CONTROL, BOOSTED_STAGE_2),
)
BEYOND = tuple(("GE", arm) for arm in ("GE_boosted", "GE_smoothing", "GE_averaged"))
DIFFERENCES_7 = (("MSDNet_7", "GE_7"), ("GE_7", "GE_ISC_OFA_7"))


def with_count(values: list[float], sign: str = "") -> str:
    """Return ``spread`` of values and their number."""
    return f"{spread(values, sign)} (n = {len(values)})"


def spread_columns(rows: list[list[float]], sign: str = "") -> list[str]:
    """Return ``spread`` of every column, then the number of rows; nothing if there are none."""
    columns = [spread(list(column), sign) for column in zip(*rows, strict=True)]
    return [*columns, str(len(rows))] if rows else []


def exit_names(count: int) -> list[str]:
    """Return the titles of the columns of exits."""
    return [f"exit {k}" for k in range(1, count + 1)]


def budget_names() -> list[str]:
    """Return the titles of the columns of budgets."""
    return [f"{budget / 1e6:.0f} M" for budget in BUDGETS]


def exit_accuracies(folder: Path) -> list[float]:
    """Return the test accuracy of every exit."""
    return [row["acc1"] for row in read_csv(folder / "anytime.csv")]


def ensemble_accuracies(folder: Path) -> list[float]:
    """Return the test accuracy of every exit, with the ensemble where one was chosen."""
    return [row["ensemble_acc1"] for row in read_csv(folder / "anytime.csv")]


def budget_accuracies(
    folder: Path, file: str = "budgeted.csv", budgets: Iterable[float] = BUDGETS
) -> list[float]:
    """Return the test accuracy of the policy that is best on held-out images within each of ``budgets``.

    A policy is within a budget if its mean operations on held-out images are: test images choose nothing.
    """
    rows = read_csv(folder / file)
    return [best_within(rows, budget)["test_acc1"] for budget in budgets]


def within_budget(folder: Path) -> list[float]:
    """Return the test accuracy within ``BUDGET``, by the paper's rule."""
    return budget_accuracies(folder, budgets=[BUDGET])


def last_exit(folder: Path) -> list[float]:
    """Return the test accuracy of the last exit."""
    return exit_accuracies(folder)[-1:]


# What two arms are compared by: the accuracies of the first, and of the second.
METRICS: dict[str, tuple[Accuracies, Accuracies]] = {
    "exits": (exit_accuracies, exit_accuracies),
    "last-exit": (last_exit, last_exit),
    "ensembles": (ensemble_accuracies, ensemble_accuracies),
    "adding-ensembles": (exit_accuracies, ensemble_accuracies),
    "budget": (within_budget, within_budget),
}


def read_log(folder: Path) -> list[dict]:
    """Return the epochs of a training log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def runs_of(arm: str, schedule: str) -> list[Path]:
    """Return the folders of an arm's results with a schedule, one per seed."""
    return seeds_of(arm, SCHEDULES[schedule].results)


def over_seeds(arm: str, schedule: str, accuracies: Accuracies) -> list[str]:
    """Return the columns and the number of seeds of an arm that was run, nothing of another."""
    return spread_columns([accuracies(folder) for folder in runs_of(arm, schedule)])


def comparison(
    published: list[list[str]],
    names: list[str],
    arms_of: Callable[[str], Iterable[str]],
    accuracies: Accuracies,
) -> str:
    """Return what others report, then our runs, from the longest training to the shortest."""
    rows = [["100 classes, as reported", *row, ""] for row in published]
    for schedule in COMPARED_SCHEDULES:
        for arm in arms_of(schedule):
            if columns := over_seeds(arm, schedule, accuracies):
                rows.append([training(schedule), f"ours: {ARMS[arm].title}", *columns])
    return markdown_table(["training", "network", *names, "n"], rows)


def longest(*arms: str) -> str:
    """Return the longest schedule of all classes with which ``arms`` were trained, all with one seed.

    Raises:
        UserError: There is none.
    """
    for name in FULL_SCHEDULES:
        seeds = [{run.parent.name for run in runs_of(arm, name)} for arm in arms]
        if set.intersection(*seeds):
            return name
    raise UserError(f"no schedule has results of {' and '.join(arms)} with one seed")


def epochs_of(schedule: str) -> str:
    """Return the epochs of a schedule in words."""
    return "{} + {} epochs".format(*SCHEDULES[schedule].epochs)


def training(schedule: str) -> str:
    """Return the classes and epochs of a schedule in words."""
    return f"{100 // SCHEDULES[schedule].every_nth_class} classes, {epochs_of(schedule)}"


def shown_arms(schedule: str) -> tuple[str, ...]:
    """Return the arms to show beside what others report.

    Only in the runs of 100 epochs stage 2 keeps the boost of boosted exits.
    """
    return (*MAIN_ARMS, BOOSTED, BOOSTED_STAGE_2) if schedule == "100_epochs" else (*MAIN_ARMS, BOOSTED)


def precision_note(folders: Iterable[Path]) -> str:
    """Return what to add to the title of runs of all classes trained in float32; most were in bf16."""
    run_files = [(folder / "run.json").read_text(encoding="utf-8") for folder in folders]
    return " (float32)" if any(json.loads(run)["settings"]["amp"] == "off" for run in run_files) else ""


def exits_table(schedules: Iterable[str] = FULL_SCHEDULES) -> str:
    """Return the accuracy of every exit, and at a budget, of the network with 5 exits and all classes."""
    first_run = runs_of("GE", "30_epochs")[0]
    operations = [row["operations"] / 1e6 for row in read_csv(first_run / "anytime.csv")]
    rows = [["as reported", f"paper: {name}", *accuracies, "", ""] for name, accuracies in PAPER.items()]
    for name in schedules:
        for arm in shown_arms(name):
            folders = runs_of(arm, name)
            if folders:
                values = [[*exit_accuracies(run), *within_budget(run)] for run in folders]
                title = f"ours: {ARMS[arm].title}{precision_note(folders)}"
                rows.append([epochs_of(name), title, *spread_columns(values)])
    names = [f"exit {k} ({millions:.2f} M)" for k, millions in enumerate(operations, start=1)]
    return markdown_table(["training", "network", *names, f"{BUDGET / 1e6:.0f} M, paper's rule", "n"], rows)


def pairs_ahead(before: str, after: str) -> str:
    """Return in how many pairs of runs with the same seed ``after`` ended above ``before`` in the mean."""
    by_seed = [row for schedule in COMPARED_SCHEDULES for row in gains(before, after, schedule)]
    by_seed += gains(f"{before}_7", f"{after}_7", "short")
    return f"{sum(row[-1] > 0 for row in by_seed)} of {len(by_seed)}"


def summary() -> str:
    """Return the table of the project's README: the main arms, with the longest schedule that has one."""
    return exits_table([min((longest(arm) for arm in MAIN_ARMS), key=FULL_SCHEDULES.index)])


def budgets_table() -> str:
    """Return the accuracy at every budget."""
    return comparison([["report: MSDNet", *REPORT_BUDGETED]], budget_names(), shown_arms, budget_accuracies)


def static_table() -> str:
    """Return the main arms, each with its longest schedule, within the operations of each static network."""
    rows = [["200 epochs", "static", "", *(f"{accuracy}" for *_, accuracy in STATIC), ""]]
    for arm in shown_arms("100_epochs"):
        schedule = longest(arm)
        for title, file in (("paper's rule", "budgeted.csv"), ("optimised, with ensembles", "ensemble.csv")):
            budgets = [1e6 * millions for _, millions, _ in STATIC]
            columns = spread_columns(
                [
                    budget_accuracies(run, file, budgets)
                    for run in runs_of(arm, schedule)
                    if (run / file).exists()
                ]
            )
            if columns:
                rows.append([epochs_of(schedule), f"ours: {TITLES[arm]}", title, *columns])
    columns = [f"{millions} M, {name}" for name, millions, _ in STATIC]
    return markdown_table(["training", "network", "policies", *columns, "n"], rows)


def exits_7_table() -> str:
    """Return the accuracy of every exit of the network with 7 exits."""
    reported = [[f"report: {name}", *map(str, accuracies)] for name, accuracies in REPORT_7.items()]
    arms = [f"{arm}_7" for arm in MAIN_ARMS]
    return comparison(reported, exit_names(7), lambda _: arms, exit_accuracies)


def arms_table() -> str:
    """Return every exit of every arm of the short schedule with 5 exits."""
    columns = {title: over_seeds(arm, "short", exit_accuracies) for arm, title in TITLES.items()}
    return markdown_table(
        ["arm", *exit_names(5), "n"], [[title, *own] for title, own in columns.items() if own]
    )


def arms_budgets_table() -> str:
    """Return the accuracy at every budget of the arms of the short schedule, with both rules."""
    rules = {"paper's": budget_accuracies, "optimised": partial(budget_accuracies, file="optimised.csv")}
    rows = [
        [TITLES[arm], rule, *over_seeds(arm, "short", accuracies)]
        for arm in BUDGETED_ARMS
        for rule, accuracies in rules.items()
    ]
    return markdown_table(["arm", "thresholds", *budget_names(), "n"], rows)


def thresholds_table() -> str:
    """Return the accuracy that the optimised thresholds gain on the paper's.

    Gains are averaged over the arms of a seed, as most of these share a network.
    """
    rows = []
    for schedule in ("100_epochs", "30_epochs", "short"):
        by_seed: dict[str, list[list[float]]] = {}
        for arm in TITLES:
            for folder in runs_of(arm, schedule):
                pair = zip(budget_accuracies(folder, "optimised.csv"), budget_accuracies(folder), strict=True)
                by_seed.setdefault(folder.parent.name, []).append([a - b for a, b in pair])
        if not by_seed:
            continue
        means = [[statistics.mean(column) for column in zip(*arms, strict=True)] for arms in by_seed.values()]
        columns = spread_columns([[*gain, statistics.mean(gain)] for gain in means], "+")
        rows.append([training(schedule), *columns])
    return markdown_table(["optimised thresholds minus the paper's", *budget_names(), "mean", "n"], rows)


def gains(before: str, after: str, schedule: str, metric: str = "exits") -> list[list[float]]:
    """Return by seed what ``after`` gains on ``before`` with that seed.

    Args:
        before: An arm.
        after: Another arm, or the same one.
        schedule: Of both.
        metric: What is compared, a key of ``METRICS``.

    Returns:
        For every seed that has both, the gains of that metric, such as one for every exit, then their mean.
    """
    of_before, of_after = METRICS[metric]
    by_seed = []
    for run in runs_of(after, schedule):
        if run.parent / before in runs_of(before, schedule):
            pairs = zip(of_after(run), of_before(run.parent / before), strict=True)
            by_seed.append([a - b for a, b in pairs])
    return [[*gain, statistics.mean(gain)] for gain in by_seed if gain]


def differences_table(
    differences: Iterable[tuple[str, str]],
    schedule: str = "short",
    num_exits: int = 5,
    ensembles_of: Iterable[str] = (),
) -> str:
    """Return rows of ``gains`` of pairs of arms, then of ensembles of exits on each exit alone."""
    compared = [
        (ARMS[after].title, ARMS[before].title, gains(before, after, schedule))
        for before, after in differences
    ]
    for arm in ensembles_of:
        title = ARMS[arm].title
        compared.append(
            (f"{title}, ensembles of exits", title, gains(arm, arm, schedule, "adding-ensembles"))
        )
    rows = [
        [title, other, *spread_columns(by_seed, "+"), " ".join(f"{gain[-1]:+.2f}" for gain in by_seed)]
        for title, other, by_seed in compared
        if by_seed
    ]
    names = [*exit_names(num_exits), "mean of exits", "n", "seed by seed"]
    return markdown_table(["arm", "compared with", *names], rows)


def effect(before: str, after: str, schedule: str = "short", metric: str = "exits") -> str:
    """Return the mean of what ``gains`` returns: its mean and spread over seeds, and their number."""
    by_seed = gains(before, after, schedule, metric)
    if not by_seed:
        raise UserError(f"no seed has results of {before} and {after} with the schedule {schedule}")
    return with_count([gain[-1] for gain in by_seed], "+")


def epochs_table() -> str:
    """Return what the logs of all runs of stage 1 on the short schedule tell about choosing an epoch."""
    logs = [
        read_log(folder) for arm in TITLES if ARMS[arm].origin is None for folder in runs_of(arm, "short")
    ]
    accuracies = [[epoch["val_mean_acc1"] for epoch in log] for log in logs]
    is_last = sum(max(log) == log[-1] for log in accuracies)
    rows = [
        ["the best epoch is the last one", f"in {is_last} of {len(logs)} runs"],
        [
            "the lowest epoch, as stage 1 of the released code chooses, against the best one",
            with_count([min(log) - max(log) for log in accuracies], "+"),
        ],
    ]
    return markdown_table(["held-out accuracy, mean of exits, points", "measured"], rows)


def runs_table() -> str:
    """Return how every arm of the short schedule was trained."""
    rows = []
    for arm in ARMS:
        if folders := runs_of(arm, "short"):
            minutes = [sum(epoch["seconds"] for epoch in read_log(folder)) / 60 for folder in folders]
            flags = " ".join(ARMS[arm].flags)
            seeds = ", ".join(folder.parent.name.removeprefix("seed_") for folder in folders)
            rows.append(
                [arm, f"`{flags}`" if flags else "", seeds, ", ".join(f"{number:.0f}" for number in minutes)]
            )
    return markdown_table(
        ["arm", "flags beside the schedule's", "seeds", "minutes of training, each seed"], rows
    )


def mean_rows(folders: list[Path], file: str, accuracy: str) -> list[dict]:
    """Return ``operations`` and ``accuracy`` of a file's rows, means over folders."""
    by_row = zip(*(read_csv(folder / file) for folder in folders), strict=True)
    return [
        {name: statistics.mean(row[name] for row in rows) for name in ("operations", accuracy)}
        for rows in by_row
    ]


def draw_arms(schedule: str) -> Figure:
    """Draw exits (points) and budgets (lines) of the main and the combined arms, means over seeds.

    The static networks are triangles.
    """
    folders = {TITLES[arm]: runs_of(arm, schedule) for arm in shown_arms(schedule)}
    figure = draw_curves(
        {
            title: (mean_rows(own, "anytime.csv", "acc1"), mean_rows(own, "budgeted.csv", "test_acc1"), [])
            for title, own in folders.items()
            if own
        }
    )
    (axes,) = figure.axes
    for name, operations, accuracy in STATIC:
        axes.plot(operations, accuracy, "k^", markersize=6)
        axes.annotate(
            name,
            (operations, accuracy),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize="x-small",
        )
    axes.margins(0.1)
    return figure


def check_backbones() -> None:
    """Check that the arms of stage 2 that are compared start from the same network.

    Raises:
        UserError: Arms of one seed froze different networks of the same arm of stage 1.
    """
    frozen: dict[tuple[Path, str], str] = {}
    results = [schedule.results for schedule in SCHEDULES.values()]
    for run_json in sorted(path for folder in results for path in folder.glob("seed_*/*/run.json")):
        arm = ARMS[run_json.parent.name]
        digest = json.loads(run_json.read_text(encoding="utf-8")).get("frozen_digest")
        # With --backbone-bn moving the digest leaves out BatchNorm's statistics: it differs from the others.
        if digest is None or "moving" in arm.flags:
            continue
        if frozen.setdefault((run_json.parent.parent, arm.origin), digest) != digest:
            raise UserError(
                f"{run_json.parent} started from another {arm.origin} than the other arms of its seed"
            )


TABLES = {
    "summary": summary,
    "exits": exits_table,
    "budgets": budgets_table,
    "static": static_table,
    "exits-7": exits_7_table,
    "arms": arms_table,
    "arms-budgets": arms_budgets_table,
    "differences-1": partial(differences_table, DIFFERENCES_1),
    "differences-2": partial(differences_table, DIFFERENCES_2),
    "differences-100-epochs": partial(
        differences_table,
        (*DIFFERENCES_ALL_CLASSES, *DIFFERENCES_ON_BOOSTED),
        "100_epochs",
        ensembles_of=shown_arms("100_epochs"),
    ),
    "differences-all-classes": partial(
        differences_table, DIFFERENCES_ALL_CLASSES, "30_epochs", ensembles_of=shown_arms("30_epochs")
    ),
    "beyond": partial(differences_table, BEYOND, "10_epochs"),
    "differences-7": partial(differences_table, DIFFERENCES_7, num_exits=7),
    "thresholds": thresholds_table,
    "epochs": epochs_table,
    "runs": runs_table,
    "pretrained": backbones.results_table,
}


def with_tables(text: str) -> str:
    """Return ``text`` with its tables and effects up to date.

    They lie between ``<!-- table NAME -->``, ``<!-- effect BEFORE AFTER SCHEDULE METRIC -->`` (short and
    exits, if not given) or ``<!-- pairs BEFORE AFTER -->``, and ``<!-- end -->``.
    """
    text = re.sub(
        r"(<!-- table (\S+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )
    numbers = {"effect": effect, "pairs": pairs_ahead}
    return re.sub(
        r"(<!-- (effect|pairs) (.*?) -->).*?(<!-- end -->)",
        lambda match: f"{match[1]}{numbers[match[2]](*match[3].split())}{match[4]}",
        text,
    )


def main() -> int:
    """Print or write the tables, and return the exit status."""
    parser = CommandLineParser(
        prog="experiments.tables", description="Print the result tables, or write them and the figures."
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the tables into README.md and results/README.md, and draw the figures",
    )
    arguments = parser.parse_args()
    try:
        check_backbones()
        if arguments.write:
            for document in DOCUMENTS:
                text = with_tables(document.read_text(encoding="utf-8"))
                with atomic_write(document) as stream:
                    stream.write(text)
            for schedule in FULL_SCHEDULES:
                results = SCHEDULES[schedule].results
                if results.exists():
                    save_figure(draw_arms(schedule), results / "arms.png")
        else:
            sys.stdout.write("\n\n".join(f"{name}\n\n{make()}" for name, make in TABLES.items()) + "\n")
    except UserError as error:
        print_error(f"{parser.prog}: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
