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

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "results" / "README.md")
SHORT, TRIALS, MEDIUM, LONG, PUBLISHED = (
    SCHEDULES[name].results for name in ("short", "10_epochs", "30_epochs", "100_epochs", "published")
)
TRAINING = {
    PUBLISHED: "100 classes, 300 + 180 epochs",
    LONG: "100 classes, 100 + 40 epochs",
    MEDIUM: "100 classes, 30 + 10 epochs",
    SHORT: "20 classes, 5 + 3 epochs",
}
FULL_SCHEDULES = ("published", "100_epochs", "30_epochs")  # all classes, the longest first
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
EXIT_GROUPS = (slice(0, 2), slice(2, 5))  # of the network with 5 exits: the first two, the later ones
# Standard error of an accuracy of 70 % on 10,000 test images: smaller gains of OFA are not called gains.
TEST_SET_ERROR = 0.46  # points

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


def read_log(folder: Path) -> list[dict]:
    """Return the epochs of a training log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def over_seeds(arm: str, results: Path, accuracies: Callable[[Path], list[float]]) -> list[str]:
    """Return the columns and the number of seeds of an arm that was run, nothing of another."""
    return spread_columns([accuracies(folder) for folder in seeds_of(arm, results)])


def comparison(
    published: list[list[str]],
    names: list[str],
    arms_of: Callable[[Path], Iterable[str]],
    accuracies: Callable[[Path], list[float]],
) -> str:
    """Return what others report, then our runs, from the longest training to the shortest."""
    rows = [["100 classes, as reported", *row, ""] for row in published]
    for results, training in TRAINING.items():
        for arm in arms_of(results):
            if columns := over_seeds(arm, results, accuracies):
                rows.append([training, f"ours: {ARMS[arm].title}", *columns])
    return markdown_table(["training", "network", *names, "n"], rows)


def longest(*arms: str) -> str:
    """Return the longest schedule of all classes with which ``arms`` were trained, all with one seed.

    Raises:
        UserError: There is none.
    """
    for name in FULL_SCHEDULES:
        seeds = [{run.parent.name for run in seeds_of(arm, SCHEDULES[name].results)} for arm in arms]
        if set.intersection(*seeds):
            return name
    raise UserError(f"no schedule has results of {' and '.join(arms)} with one seed")


def epochs_of(schedule: str) -> str:
    """Return the epochs of a schedule of all classes in words."""
    return TRAINING[SCHEDULES[schedule].results].removeprefix("100 classes, ")


def shown_arms(results: Path) -> tuple[str, ...]:
    """Return the arms to show beside what others report.

    Only in the runs of 100 epochs stage 2 keeps the boost of boosted exits.
    """
    return (*MAIN_ARMS, BOOSTED, BOOSTED_STAGE_2) if results == LONG else (*MAIN_ARMS, BOOSTED)


def precision_note(folders: Iterable[Path]) -> str:
    """Return what to add to the title of runs of all classes trained in float32; most were in bf16."""
    run_files = [(folder / "run.json").read_text(encoding="utf-8") for folder in folders]
    return " (float32)" if any(json.loads(run)["settings"]["amp"] == "off" for run in run_files) else ""


def exits_table(schedules: Iterable[str] = FULL_SCHEDULES) -> str:
    """Return the accuracy of every exit, and at a budget, of the network with 5 exits and all classes."""
    operations = [row["operations"] / 1e6 for row in read_csv(MEDIUM / "seed_1" / "GE" / "anytime.csv")]
    rows = [["as reported", f"paper: {name}", *accuracies, "", ""] for name, accuracies in PAPER.items()]
    for name in schedules:
        for arm in shown_arms(SCHEDULES[name].results):
            folders = seeds_of(arm, SCHEDULES[name].results)
            if folders:
                values = [
                    [*exit_accuracies(run), *budget_accuracies(run, budgets=[BUDGET])] for run in folders
                ]
                title = f"ours: {ARMS[arm].title}{precision_note(folders)}"
                rows.append([epochs_of(name), title, *spread_columns(values)])
    names = [f"exit {k} ({millions:.2f} M)" for k, millions in enumerate(operations, start=1)]
    return markdown_table(["training", "network", *names, f"{BUDGET / 1e6:.0f} M, paper's rule", "n"], rows)


def pairs_ahead() -> str:
    """Return in how many pairs of trainings with one seed GE ended above plain MSDNet (mean of exits)."""
    by_seed = [row for results in TRAINING for row in gains("MSDNet", "GE", results)]
    by_seed += gains("MSDNet_7", "GE_7")
    return f"{sum(row[-1] > 0 for row in by_seed)} of {len(by_seed)} pairs of trainings"


def summary() -> str:
    """Return the table and the findings of the project's README.

    A finding is of the longest schedule that has both arms, and names it unless it is the longest of all.
    """
    named = min((longest(arm) for arm in MAIN_ARMS), key=FULL_SCHEDULES.index)
    parts = longest("GE_classifiers", "GE_ISC", "GE_OFA")  # of stage 2

    def cited(by_seed: list[list[float]], schedule: str, names_schedule: bool = True) -> str:
        notes = [f"n = {len(by_seed)}"] if len(by_seed) > 1 else []
        notes += [epochs_of(schedule)] if names_schedule and schedule != named else []
        mean = spread([row[-1] for row in by_seed], "+")
        return f"{mean} ({', '.join(notes)})" if notes else mean

    def gain(before: str, arm: str) -> str:
        schedule = longest(before, arm)
        return cited(gains(before, arm, SCHEDULES[schedule].results), schedule)

    def ensembles(arm: str) -> str:
        schedule = longest(arm)
        return cited(ensemble_gains(arm, SCHEDULES[schedule].results), schedule)

    def with_ensembles(before: str, arm: str, schedules: Iterable[str] = FULL_SCHEDULES) -> str:
        compared = {
            schedule: gains(before, arm, SCHEDULES[schedule].results, ensemble_accuracies)
            for schedule in schedules
        }
        return " and ".join(cited(by_seed, schedule) for schedule, by_seed in compared.items() if by_seed)

    of_ge = []
    for schedule in FULL_SCHEDULES:
        if by_seed := gains("MSDNet", "GE", SCHEDULES[schedule].results):
            first, later = (
                spread([statistics.mean(row[part]) for row in by_seed], "+") for part in EXIT_GROUPS
            )
            of_ge.append(
                f"by {cited(by_seed, schedule)}: {first} at exits 1 and 2, {later} at the later ones"
            )
    distilled = (("GE_classifiers", "GE_OFA"), ("GE_ISC", "GE_ISC_OFA"))
    of_distillation = [gains(*pair, SCHEDULES[parts].results) for pair in distilled]
    is_measurable = max(statistics.mean(row[-1] for row in rows) for rows in of_distillation) > TEST_SET_ERROR
    ofa, ofa_on_isc = (cited(rows, parts, names_schedule=False) for rows in of_distillation)
    short_ofa, short_ofa_on_isc = (spread([row[-1] for row in gains(*pair)], "+") for pair in distilled)

    def of_parts(before: str, arm: str) -> str:
        return cited(gains(before, arm, SCHEDULES[parts].results), parts, names_schedule=False)

    schedule_on_boosted = longest(BOOSTED_STAGE_2, BOOSTED_CONTROL)
    lines = (
        f"1. **GE** changes the mean of plain MSDNet {'; '.join(of_ge)}. "
        f"It was ahead in {pairs_ahead()}, with 20 or 100 classes.",
        f"2. **Stage 2** gains {gain('GE', 'GE_ISC_OFA')} on GE. After {epochs_of(parts)} stage 2 changes "
        f"the mean by {of_parts('GE', 'GE_ISC_OFA')}, new classifiers alone by "
        f"{of_parts('GE', 'GE_classifiers')}, and **ISC** on these by "
        f"{of_parts('GE_classifiers', 'GE_ISC')}.",
        f"3. **OFA** {'gains' if is_measurable else 'shows no gain'} after {epochs_of(parts)}: {ofa} alone, "
        f"{ofa_on_isc} on ISC; with 20 classes {short_ofa} and {short_ofa_on_isc} "
        f"(n = {len(gains(*distilled[0]))}, {TRAINING[SHORT].removeprefix('20 classes, ')}).",
        "4. **Boosted exits** ([Yu et al.](https://arxiv.org/abs/2211.16726)) add half of the logits of the "
        f"previous exit to their own. They gain {gain('GE', BOOSTED)} on GE. Stage 2 on them changes the "
        f"mean by {gain(BOOSTED, BOOSTED_STAGE_2)} (new classifiers alone by "
        f"{gain(BOOSTED, BOOSTED_CONTROL)}), with ensembles on both sides by "
        f"{with_ensembles(BOOSTED, BOOSTED_STAGE_2, [schedule_on_boosted])}, and the accuracy within "
        f"{BUDGET / 1e6:.0f} M by {budget_gain(BOOSTED, BOOSTED_STAGE_2)}.",
        f"5. **Ensembles** of all exits so far change the mean by {ensembles('GE')} on GE "
        f"and by {ensembles('GE_ISC_OFA')} on GE + ISC + OFA. With ensembles on both sides, stage 2 changes "
        f"it by {with_ensembles('GE', 'GE_ISC_OFA')}, boosted exits by {with_ensembles('GE', BOOSTED)}.",
    )
    title = (
        f"In points of top-1, mean over exits, after {epochs_of(named)} and with one seed (n = 1) where "
        "nothing else is said:"
    )
    return "\n".join([exits_table([named]), "", title, "", *lines])


def budget_gain(before: str, arm: str) -> str:
    """Return what ``arm`` gains on ``before`` within ``BUDGET``, with the longest schedule of both."""
    runs = seeds_of(arm, SCHEDULES[longest(before, arm)].results)
    pairs = [(run, run.parent / before) for run in runs if (run.parent / before).is_dir()]
    within = partial(budget_accuracies, budgets=[BUDGET])
    return spread([within(after)[0] - within(first)[0] for after, first in pairs], "+")


def budgets_table() -> str:
    """Return the accuracy at every budget."""
    return comparison([["report: MSDNet", *REPORT_BUDGETED]], budget_names(), shown_arms, budget_accuracies)


def static_table() -> str:
    """Return the main arms, each with its longest schedule, within the operations of each static network."""
    rows = [["200 epochs", "static", "", *(f"{accuracy}" for *_, accuracy in STATIC), ""]]
    for arm in shown_arms(LONG):
        schedule = longest(arm)
        for title, file in (("paper's rule", "budgeted.csv"), ("optimised, with ensembles", "ensemble.csv")):
            budgets = [1e6 * millions for _, millions, _ in STATIC]
            columns = spread_columns(
                [
                    budget_accuracies(run, file, budgets)
                    for run in seeds_of(arm, SCHEDULES[schedule].results)
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
    columns = {title: over_seeds(arm, SHORT, exit_accuracies) for arm, title in TITLES.items()}
    return markdown_table(
        ["arm", *exit_names(5), "n"], [[title, *own] for title, own in columns.items() if own]
    )


def arms_budgets_table() -> str:
    """Return the accuracy at every budget of the arms of the short schedule, with both rules."""
    rules = {"paper's": budget_accuracies, "optimised": partial(budget_accuracies, file="optimised.csv")}
    rows = [
        [TITLES[arm], rule, *over_seeds(arm, SHORT, accuracies)]
        for arm in BUDGETED_ARMS
        for rule, accuracies in rules.items()
    ]
    return markdown_table(["arm", "thresholds", *budget_names(), "n"], rows)


def thresholds_table() -> str:
    """Return the accuracy that the optimised thresholds gain on the paper's.

    Gains are averaged over the arms of a seed, as most of these share a network.
    """
    rows = []
    for results in (LONG, MEDIUM, SHORT):
        by_seed: dict[str, list[list[float]]] = {}
        for arm in TITLES:
            for folder in seeds_of(arm, results):
                pair = zip(budget_accuracies(folder, "optimised.csv"), budget_accuracies(folder), strict=True)
                by_seed.setdefault(folder.parent.name, []).append([a - b for a, b in pair])
        if not by_seed:
            continue
        means = [[statistics.mean(column) for column in zip(*arms, strict=True)] for arms in by_seed.values()]
        columns = spread_columns([[*gain, statistics.mean(gain)] for gain in means], "+")
        rows.append([TRAINING[results], *columns])
    return markdown_table(["optimised thresholds minus the paper's", *budget_names(), "mean", "n"], rows)


def gains(
    before: str,
    after: str,
    results: Path = SHORT,
    accuracies: Callable[[Path], list[float]] = exit_accuracies,
) -> list[list[float]]:
    """Return by seed what ``after`` gains on ``before`` with that seed: at every exit, then their mean."""
    pairs = [
        (folder, folder.parent / before)
        for folder in seeds_of(after, results)
        if (folder.parent / before / "anytime.csv").exists()
    ]
    by_exit = [[a - b for a, b in zip(*map(accuracies, pair), strict=True)] for pair in pairs]
    return [[*gain, statistics.mean(gain)] for gain in by_exit]


def ensemble_gains(arm: str, results: Path) -> list[list[float]]:
    """Return by seed what ensembles of exits gain on each exit alone: at every exit, then their mean."""
    by_seed = [read_csv(folder / "anytime.csv") for folder in seeds_of(arm, results)]
    by_exit = [
        [row["ensemble_acc1"] - row["acc1"] for row in rows] for rows in by_seed if "ensemble_acc1" in rows[0]
    ]
    return [[*gain, statistics.mean(gain)] for gain in by_exit]


def differences_table(
    differences: Iterable[tuple[str, str]],
    num_exits: int = 5,
    results: Path = SHORT,
    ensembles_of: Iterable[str] = (),
) -> str:
    """Return rows of ``gains`` of pairs of arms, then of ``ensemble_gains`` of ``ensembles_of``."""
    compared = [
        (ARMS[after].title, ARMS[before].title, gains(before, after, results))
        for before, after in differences
    ]
    for arm in ensembles_of:
        title = ARMS[arm].title
        compared.append((f"{title}, ensembles of exits", title, ensemble_gains(arm, results)))
    rows = [
        [title, other, *spread_columns(by_seed, "+"), " ".join(f"{gain[-1]:+.2f}" for gain in by_seed)]
        for title, other, by_seed in compared
        if by_seed
    ]
    names = [*exit_names(num_exits), "mean of exits", "n", "seed by seed"]
    return markdown_table(["arm", "compared with", *names], rows)


def effect(before: str, after: str, schedule: str = "short") -> str:
    """Return what ``after`` gains on ``before`` in the mean of exits: mean and spread over seeds."""
    return with_count([gain[-1] for gain in gains(before, after, SCHEDULES[schedule].results)], "+")


def epochs_table() -> str:
    """Return what the logs of all runs of stage 1 on the short schedule tell about choosing an epoch."""
    logs = [read_log(folder) for arm in TITLES if ARMS[arm].origin is None for folder in seeds_of(arm, SHORT)]
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
        if folders := seeds_of(arm, SHORT):
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


def draw_arms(results: Path) -> Figure:
    """Draw exits (points) and budgets (lines) of the main and the combined arms, means over seeds.

    The static networks are triangles.
    """
    folders = {TITLES[arm]: seeds_of(arm, results) for arm in shown_arms(results)}
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
    for run_json in sorted(path for results in TRAINING for path in results.glob("seed_*/*/run.json")):
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
        results=LONG,
        ensembles_of=shown_arms(LONG),
    ),
    "differences-all-classes": partial(
        differences_table, DIFFERENCES_ALL_CLASSES, results=MEDIUM, ensembles_of=shown_arms(MEDIUM)
    ),
    "beyond": partial(differences_table, BEYOND, results=TRIALS),
    "differences-7": partial(differences_table, DIFFERENCES_7, 7),
    "thresholds": thresholds_table,
    "epochs": epochs_table,
    "runs": runs_table,
    "pretrained": backbones.results_table,
}


def with_tables(text: str) -> str:
    """Return ``text`` with its tables and effects up to date.

    They lie between ``<!-- table NAME -->`` or ``<!-- effect BEFORE AFTER SCHEDULE -->`` and ``<!-- end
    -->``.
    """
    text = re.sub(
        r"(<!-- table (\S+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )
    return re.sub(
        r"(<!-- effect (.*?) -->).*?(<!-- end -->)",
        lambda match: f"{match[1]}{effect(*match[2].split())}{match[3]}",
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
                    save_figure(draw_arms(results), results / "arms.png")
        else:
            sys.stdout.write("\n\n".join(f"{name}\n\n{make()}" for name, make in TABLES.items()) + "\n")
    except UserError as error:
        print_error(f"{parser.prog}: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
