"""The evaluations of a network: tables on the terminal, files in its directory.

Example:
    Evaluation(session, network, data, operations, curves).run(["anytime", "dynamic"])
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_inference import fold, policy_curve, read_policy, write_policy
from adaptive_inference.block_times import BlockTimes
from adaptive_inference.budgeted import ExitPredictions, evaluate_points, geometric_thresholds
from adaptive_inference.calibration import (
    MANY_IMAGES,
    calibration_errors,
    ensemble_classes,
    ensemble_operations,
    fit_ensemble,
    fit_temperatures,
)
from adaptive_inference.confidence import NONE_LEAVE
from adaptive_inference.optimised import optimised_thresholds
from adaptive_inference.policies import Point, Policy, PolicyCurve
from adaptive_inference.predictor import simulate
from adaptive_inference.promises.deadlines import deadline_rows
from adaptive_inference.promises.drift import reference_of, write_reference
from adaptive_inference.promises.risk import CERTIFICATE, certified_points
from adaptive_inference.timing import distinct, measure_blocks, runtime_rows
from dataloader import Data
from engine.collect import anytime_rows, collect_logits
from engine.easy_and_hard import easy_and_hard, examples_figure
from engine.record import RunDirectory, Session
from engine.report import (
    best_within,
    budget_rows,
    draw_curves,
    draw_runtime,
    read_csv,
    save_figure,
    table,
    write_csv,
)
from engine.runtime.precision import amp_dtype
from models import ExitNetwork, count_operations
from utils import UserError, percent, print_error

CERTIFIED_POLICIES = 40  # beside the full network
RUNTIME_IMAGES = 1024
RUNTIME_BATCHES = (1, 64)
RUNTIME_POLICIES = 10

Labelled = tuple[Tensor, Tensor]  # logits (K, N, C) of every exit and targets (N,)


class Evaluation:
    """Evaluation of a network, written into the directory of its run by the main process.

    The network is evaluated as it predicts, folded and in the dtype of ``--amp``, so that thresholds hold
    there.

    Args:
        session: The run.
        network: The network to evaluate.
        data: The test images, and for ``dynamic`` the held-out images.
        operations: Operations to each exit.
        curves: Runs whose curves are drawn, by title: this one, after others to compare it with.
        held_out_are_new: Whether the held-out images are known to be new to the network, so that they can
            test promises.
    """

    def __init__(
        self,
        session: Session,
        network: ExitNetwork,
        data: Data,
        operations: list[int],
        curves: dict[str, RunDirectory],
        held_out_are_new: bool = True,
    ):
        settings = session.settings
        self.session, self.data, self.operations, self.curves = session, data, operations, curves
        self.network = fold(network, settings.channels_last, amp_dtype(settings))
        self.measure, self.held_out_are_new = settings.measure, held_out_are_new

    def run(self, modes: list[str]) -> None:
        """Run evaluations.

        Args:
            modes: ``runtime`` alone, or any of ``anytime`` and ``dynamic``.

        Raises:
            UserError: A mode lacks what it needs: held-out images, or a policy file.
            ValueError: ``runtime`` is not alone.
        """
        if "runtime" in modes and len(modes) > 1:
            raise ValueError(f"the modes are {', '.join(modes)}; runtime must be alone")
        log, processes = self.session.log, self.session.processes
        if "dynamic" in modes and self.data.val.num_images == 0:
            raise UserError(
                "budgeted evaluation sets its thresholds on held-out images; this run has none (--val-size 0)"
            )
        if "runtime" in modes:
            log.line("measuring time, half a minute on a small network")
            self.runtime()
            return
        log.line("running the network on all images")
        test = collect_logits(self.network, self.data.test, processes)
        val = collect_logits(self.network, self.data.val, processes) if "dynamic" in modes else None
        if not processes.is_main:
            return
        full_policy = fit_full_policy(*val, self.measure) if val is not None else self.known_policy()
        if "anytime" in modes:
            self.anytime(*test, full_policy)
        if "dynamic" in modes:
            self.budgeted(val, test, full_policy)
        save_figure(draw_curves(known_curves(self.curves), len(test[1])), self.session.directory.curves)
        log.line(f"accuracy against operations: {self.session.directory.curves}")

    def known_policy(self) -> Policy | None:
        """Return a policy of the run's file, with its ensemble; None if there is none for this network."""
        directory = self.session.directory
        if not directory.policy.exists():
            return None
        try:
            policy = read_policy(directory.policy, self.network).of_rule(None)[0].policy
        except UserError as error:
            self.session.log.line(f"{directory.anytime} gets no temperatures and no ensemble: {error}")
            return None
        return policy if policy.temperatures else None

    def anytime(self, logits: Tensor, targets: Tensor, policy: Policy | None) -> None:
        """Evaluate every exit for all images.

        Args:
            logits: (K, N, C) of the test images.
            targets: (N,).
            policy: Policy whose temperatures and ensemble are evaluated too.
        """
        directory, log = self.session.directory, self.session.log
        rows = calibrated_rows(anytime_rows(logits, targets, self.operations), logits, targets, policy)
        write_csv(directory.anytime, rows)
        log.line(f"\nevery exit on the {len(targets):,} test images ({directory.anytime})")
        lazy = count_operations(self.network, self.data.info.image_size, lazy=True)
        shown = [row | {"lazy_operations": n} for row, n in zip(rows, lazy, strict=True)]
        names = ["exit", "operations", "lazy_operations", "acc1", "ece"]
        if logits.shape[2] > 5:
            names.insert(4, "acc5")
        if policy is not None:
            names += ["ece_scaled"] + (["ensemble_acc1"] if policy.ensemble else [])
        log.line(table(shown, names, len(targets)))

    def budgeted(self, val: Labelled, test: Labelled, policy: Policy) -> None:
        """Evaluate budgeted prediction: tables, the policy file, a picture of easy and hard images."""
        directory, log = self.session.directory, self.session.log
        log.line(temperature_line(policy, len(val[1])))
        curve = find_policies(self.network, self.operations, val, policy, self.held_out_are_new)
        write_policy(directory.policy, curve)
        if self.held_out_are_new:
            write_reference(directory.reference, reference_of(val[0], curve))
        else:  # one of an earlier evaluation must not pass for one of images that are new to the network
            directory.reference.unlink(missing_ok=True)
        tables = self._tables(curve, test, policy)
        for path, rows in tables.items():
            write_csv(path, rows)
        log.line(f"\nbudgeted batch prediction ({', '.join(map(str, tables))})")
        log.line(budget_table(*tables.values(), self.operations[-1], len(test[1])))
        log.line(self._half_line(tables[directory.budgeted], *test))
        log.line(f"thresholds for predict.py: {directory.policy}")
        self._draw_examples(*test, curve.default_point("optimised").policy)

    def _tables(self, curve: PolicyCurve, test: Labelled, policy: Policy) -> dict[Path, list[dict]]:
        """Return the rows of the CSV files."""
        directory, exit_predictions = self.session.directory, ExitPredictions.from_logits(*test, self.measure)
        ensemble_predictions, ensemble_costs = with_ensemble(
            exit_predictions, test[0], policy, self.operations
        )
        best = "ensemble" if policy.ensemble else "optimised"
        return {
            directory.budgeted: budget_rows(curve.of_rule("geometric"), exit_predictions, self.operations),
            directory.optimised: budget_rows(curve.of_rule("optimised"), exit_predictions, self.operations),
            directory.ensemble: budget_rows(curve.of_rule(best), ensemble_predictions, ensemble_costs),
        }

    def _half_line(self, rows: list[dict], logits: Tensor, targets: Tensor) -> str:
        full, count = self.operations[-1], len(targets)
        (last,) = anytime_rows(logits[-1:], targets, [full])
        everything = f"last exit for every image: {percent(last['acc1'], count)} % of {count:,} test images"
        half = best_within(rows, full / 2)
        if half is None:
            return everything
        return (
            f"within half of the full operations: {percent(half['test_acc1'], count)} % "
            f"(policy {half['p']} of {len(rows)}, the best on held-out images); {everything}"
        )

    def _draw_examples(self, logits: Tensor, targets: Tensor, policy: Policy) -> None:
        directory = self.session.directory
        easy, hard = easy_and_hard(logits, targets, policy)
        figure = examples_figure(self.data.test.picture, targets, (easy, hard), self.data.info.class_names)
        save_figure(figure, directory.examples)
        self.session.log.line(
            f"images that left first and right, and that only the last exit got right: {directory.examples}"
        )

    def runtime(self) -> None:
        """Measure time, one image at a time and in batches, and predictions by deadlines."""
        directory, log, network = self.session.directory, self.session.log, self.network
        if not self.session.processes.is_main:
            return
        points = distinct(read_policy(directory.policy, network).of_rule(None), RUNTIME_POLICIES)
        chosen = self.data.test.spread(RUNTIME_IMAGES)
        images, targets = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        log.line(
            f"\ntime per image on {images.device}, one at a time and {RUNTIME_BATCHES[-1]} together; "
            f"{len(points)} different policies and every exit"
        )
        rows, block_times = self._measured_rows(points, images, targets.cpu())
        write_csv(directory.runtime, rows)
        everything = replace(points[0].policy, thresholds=(NONE_LEAVE,) * network.num_exits)
        acc1 = percent_right(ensemble_classes(self._logits(images), everything.ensemble), targets.cpu())
        log.line("\npredicting by deadlines, which takes minutes beside other programs")
        deadlines = deadline_rows(network, images, block_times, acc1, everything)
        write_csv(directory.deadlines, deadlines)
        exits = [{"operations": n, "acc1": a} for n, a in zip(self.operations, acc1, strict=True)]
        budgets = [row for row in rows if row["batch_size"] == 1 and row["p"] > 0]
        save_figure(draw_runtime(budgets, exits, deadlines), directory.runtime_picture)
        log.line("the best prediction by a deadline, one image at a time")
        log.line(_deadline_table(deadlines, len(targets)))
        files = f"{directory.runtime}, {directory.deadlines}, {directory.runtime_picture}"
        log.line(f"{len(targets):,} test images; {files}")

    def _logits(self, images: Tensor) -> Tensor:
        """Return the logits (K, N, C) of images, on the CPU."""
        with torch.inference_mode():
            parts = [
                torch.stack(self.network(part)).float().cpu() for part in images.split(RUNTIME_BATCHES[-1])
            ]
        return torch.cat(parts, dim=1)

    def _measured_rows(
        self, points: list[Point], images: Tensor, targets: Tensor
    ) -> tuple[list[dict[str, Any]], BlockTimes]:
        """Return rows of time, operations and accuracy by batch size, and the times of blocks at batch 1."""
        network, logits = self.network, self._logits(images)
        everything = replace(points[0].policy, thresholds=(NONE_LEAVE,) * network.num_exits, ensemble=None)
        predictions = [
            simulate(logits, policy) for policy in (everything, *(point.policy for point in points))
        ]
        lazy = count_operations(network, self.data.info.image_size, lazy=True)
        costs = torch.tensor([self.operations, lazy], dtype=torch.float64)
        rows, block_times = [], []
        for batch_size in RUNTIME_BATCHES:
            times = measure_blocks(network, images[:1], batch_size)
            self.session.log.line(str(times))
            block_times.append(times)
            measured = runtime_rows(network, points, images, times)
            for row, prediction in zip(measured, predictions, strict=True):
                mean_costs = costs[:, prediction.exits].mean(dim=1).round().long().tolist()
                row["operations"], row["lazy_operations"] = mean_costs
                (row["acc1"],) = percent_right(prediction.classes[None], targets)
            rows += measured
            self.session.log.line(_runtime_table(measured, len(targets)))
        return rows, block_times[0]


def calibrated_rows(
    rows: list[dict], logits: Tensor, targets: Tensor, policy: Policy | None
) -> list[dict[str, Any]]:
    """Add calibration errors, and what the temperatures and the ensemble of a policy make of every exit.

    Args:
        rows: A row for each exit, of ``anytime_rows``.
        logits: (K, N, C).
        targets: (N,).
        policy: The policy, None to leave out its columns.
    """
    columns = {"ece": calibration_errors(logits, targets)}
    if policy is not None:
        columns["ece_scaled"] = calibration_errors(logits, targets, policy.temperatures)
        columns["temperature"] = policy.temperatures
        # Without an ensemble not counted again: equal logits in 16 bits may be ordered differently.
        ensemble_acc1 = [row["acc1"] for row in rows]
        if policy.ensemble is not None:
            ensemble_acc1 = percent_right(ensemble_classes(logits, policy.ensemble), targets)
        columns["ensemble_acc1"] = ensemble_acc1
    return [row | {name: values[k] for name, values in columns.items()} for k, row in enumerate(rows)]


def fit_full_policy(logits: Tensor, targets: Tensor, measure: str) -> Policy:
    """Return the policy of the full network: its temperatures and ensemble are shared by all others.

    Args:
        logits: (K, N, C) of held-out images.
        targets: (N,).
        measure: Measure of confidence of the policies.
    """
    temperatures = tuple(fit_temperatures(logits, targets))
    ensemble = fit_ensemble(logits, targets, temperatures)
    return Policy((NONE_LEAVE,) * len(logits), measure, temperatures, ensemble)


def with_ensemble(
    predictions: ExitPredictions, logits: Tensor, policy: Policy, operations: list[int]
) -> tuple[ExitPredictions, list[int]]:
    """Return the predictions of the policy's ensemble at every exit, and the operations to them.

    Args:
        predictions: Predictions of each exit alone.
        logits: (K, N, C).
        policy: Without an ensemble, both come back unchanged.
        operations: Operations to each exit.
    """
    if policy.ensemble is None:
        return predictions, operations
    ensemble_predictions = predictions._replace(classes=ensemble_classes(logits, policy.ensemble))
    return ensemble_predictions, ensemble_operations(operations, logits.shape[2])


def find_policies(
    network: ExitNetwork,
    operations: list[int],
    val: Labelled,
    policy: Policy,
    held_out_are_new: bool = True,
) -> PolicyCurve:
    """Return the policies of all rules.

    Args:
        network: The network that gave the logits.
        operations: Operations to each exit.
        val: Held-out images.
        policy: Measure, temperatures and ensemble.
        held_out_are_new: Whether the held-out images are known to be new to the network, so that they can
            test promises about accuracy.
    """
    exit_predictions = ExitPredictions.from_logits(*val, policy.measure)
    exit_policy = replace(policy, ensemble=None)
    rules = {
        "geometric": geometric_thresholds(exit_predictions.confidence),
        "optimised": optimised_thresholds(exit_predictions, operations),
    }
    points: list[Point] = []
    for rule, thresholds in rules.items():
        points += evaluate_points(rule, thresholds, exit_policy, exit_predictions, operations)
    ensemble_predictions, ensemble_costs = with_ensemble(exit_predictions, val[0], policy, operations)
    if policy.ensemble is not None:
        thresholds = optimised_thresholds(ensemble_predictions, ensemble_costs)
        points += evaluate_points("ensemble", thresholds, policy, ensemble_predictions, ensemble_costs)
    # The full network is always certified, as it loses nothing against itself.
    count = CERTIFIED_POLICIES if held_out_are_new else 0
    points += certified_points(ensemble_predictions, policy, ensemble_costs, num_points=count)
    return policy_curve(network, operations, points, len(val[1]), CERTIFICATE)


def temperature_line(policy: Policy, num_images: int) -> str:
    """Return a line about the temperatures and the number of held-out images they rest on."""
    temperatures = " / ".join(f"{temperature:.2f}" for temperature in policy.temperatures)
    few = "" if num_images >= MANY_IMAGES else ", few: none is set below 1, and confidences are uncertain"
    return f"temperatures of the exits {temperatures}, fitted on {num_images:,} held-out images{few}"


def budget_table(
    geometric: list[dict], optimised: list[dict], ensemble: list[dict], full: int, num_images: int
) -> str:
    """Return about ten policies of each of the three rules as a table, all different.

    Args:
        geometric: Rows of ``budgeted.csv``.
        optimised: Rows of ``optimised.csv``.
        ensemble: Rows of ``ensemble.csv``.
        full: Operations of the whole network.
        num_images: Number of test images.
    """
    others = {"optimised rule": optimised, "ensemble of exits": ensemble}
    if ensemble == optimised:
        del others["ensemble of exits"]
    num_exits = sum(name.startswith("share_") for name in geometric[0])
    exits = [f"exit {k} %" for k in range(1, num_exits + 1)]
    different: dict[tuple, dict] = {}
    for i, row in list(enumerate(geometric))[3::4]:
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


def percent_right(classes: Tensor, targets: Tensor) -> list[float]:
    """Return the top-1 accuracy of classes (K, N) at every exit, with four digits; targets (N,)."""
    return [round(acc1, 4) for acc1 in (100 * (classes == targets).double().mean(dim=1)).tolist()]


def _runtime_table(rows: list[dict], num_images: int) -> str:
    """Return the table of rows that begin with that of running every exit."""
    full, shown = rows[0], []
    for row in rows:
        shares = {
            "share_of_operations": 100 * row["operations"] / full["operations"],
            "share_of_time": 100 * row["milliseconds"] / full["milliseconds"],
        }
        shown.append({**row, "p": row["p"] or "every exit", **shares})
    names = ("batch_size", "p", "operations", "lazy_operations", "share_of_operations", "milliseconds")
    return table(shown, (*names, "expected_milliseconds", "share_of_time", "acc1"), num_images)


def _deadline_table(rows: list[dict], num_images: int) -> str:
    shown = [
        {"deadline ms": row["milliseconds"], "acc1": row["acc1"], "late %": 100 * row["late"]} for row in rows
    ]
    return table(shown, list(shown[0]), num_images)


def known_curves(runs: dict[str, RunDirectory]) -> dict[str, tuple[list[dict], list[dict], list[dict]]]:
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
