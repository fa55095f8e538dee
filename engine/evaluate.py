"""The evaluations of a network: tables on the terminal, files in its directory.

Example:
    evaluation = Evaluation(session, network, data, operations, runs_to_draw, held_out_are_new=True)
    evaluation.run(["anytime", "dynamic"])
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_inference import find_policies, fit_full_policy, fold, read_policy, write_policy
from adaptive_inference.block_times import BlockTimes
from adaptive_inference.budgeted import ExitPredictions
from adaptive_inference.calibration import calibration_errors, ensemble_classes, with_ensemble
from adaptive_inference.confidence import NONE_LEAVE
from adaptive_inference.policies import Point, Policy, PolicyCurve
from adaptive_inference.predictor import simulate
from adaptive_inference.promises.deadlines import deadline_rows
from adaptive_inference.promises.drift import reference_of, write_reference
from adaptive_inference.promises.risk import with_certified_points
from adaptive_inference.timing import distinct, measure_blocks, runtime_rows
from dataloader import Data
from engine.collect import anytime_rows, collect_logits, collected_indices
from engine.example_images import example_images, examples_figure
from engine.report import (
    best_within,
    budget_rows,
    budget_table,
    deadline_table,
    draw_curves,
    draw_runtime,
    known_curves,
    runtime_table,
    save_figure,
    table,
    temperature_line,
    write_csv,
)
from engine.run_directory import RunDirectory
from engine.runtime.precision import amp_dtype
from engine.session import Session
from models import ExitNetwork, count_operations
from utils import UserError, percent

CERTIFIED_POLICIES = 40  # beside the full network
RUNTIME_IMAGES = 1024
RUNTIME_BATCHES = (1, 64)
RUNTIME_POLICIES = 10

LogitsAndTargets = tuple[Tensor, Tensor]  # logits (K, N, C) of every exit and targets (N,)


class Evaluation:
    """Evaluation of a network, written into the directory of its run by the main process.

    The network is evaluated as it predicts, folded and in the dtype of ``--amp``, so that thresholds hold
    there.

    Args:
        session: The run.
        network: The network to evaluate.
        data: The test images, and for ``dynamic`` the held-out images.
        operations: Operations to each exit.
        runs_to_draw: Runs whose curves are drawn, by title: this one, after others to compare it with.
        held_out_are_new: Whether the held-out images are known to be new to the network, so that they can
            test promises.
    """

    def __init__(
        self,
        session: Session,
        network: ExitNetwork,
        data: Data,
        operations: list[int],
        runs_to_draw: dict[str, RunDirectory],
        held_out_are_new: bool,
    ):
        settings = session.settings
        self.session, self.data, self.operations = session, data, operations
        self.runs_to_draw = runs_to_draw
        self.network = fold(network, settings.channels_last, amp_dtype(settings))
        self.measure, self.held_out_are_new = settings.measure, held_out_are_new

    def run(self, modes: list[str]) -> None:
        """Evaluate accuracy against operations.

        Args:
            modes: ``anytime`` or ``dynamic`` or both.

        Raises:
            UserError: Held-out images are missing for ``dynamic``.
        """
        log, processes = self.session.log, self.session.processes
        if "dynamic" in modes and self.data.val.num_images == 0:
            raise UserError(
                "budgeted evaluation sets its thresholds on held-out images; this run has none (--val-size 0)"
            )
        log.line("running the network on all images")
        test = collect_logits(self.network, self.data.test, processes)
        test_indices = collected_indices(self.data.test, processes)
        val = collect_logits(self.network, self.data.val, processes) if "dynamic" in modes else None
        if not processes.is_main:
            return
        full_policy = fit_full_policy(*val, self.measure) if val is not None else self.known_policy()
        if "anytime" in modes:
            self.anytime(*test, full_policy)
        if "dynamic" in modes:
            curve = self.budgeted(val, test, full_policy)
            self._draw_examples(*test, test_indices, curve.default_point("optimised").policy)
        save_figure(draw_curves(known_curves(self.runs_to_draw), len(test[1])), self.session.directory.curves)
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

    def budgeted(self, val: LogitsAndTargets, test: LogitsAndTargets, policy: Policy) -> PolicyCurve:
        """Evaluate budgeted prediction: tables and the policy file; return the policies."""
        directory, log = self.session.directory, self.session.log
        log.line(temperature_line(policy, len(val[1])))
        if not self.held_out_are_new:
            log.line("the network may have seen the held-out images: thresholds set on them promise nothing")
        curve = find_policies(self.network, self.operations, *val, policy)
        count = CERTIFIED_POLICIES if self.held_out_are_new else 0
        curve = with_certified_points(curve, *val, policy, count)
        write_policy(directory.policy, curve)
        if self.held_out_are_new:
            write_reference(directory.reference, reference_of(val[0], curve))
        else:
            # An earlier evaluation's file would pass for the scores of images new to the network.
            directory.reference.unlink(missing_ok=True)
        tables = self._tables(curve, test, policy)
        for path, rows in tables.items():
            write_csv(path, rows)
        log.line(f"\nbudgeted batch prediction ({', '.join(map(str, tables))})")
        shown = (tables[path] for path in (directory.budgeted, directory.optimised, directory.ensemble))
        log.line(budget_table(*shown, self.operations[-1], len(test[1])))
        log.line(self._half_line(tables[directory.budgeted], *test))
        log.line(f"thresholds for predict.py: {directory.policy}")
        return curve

    def _tables(self, curve: PolicyCurve, test: LogitsAndTargets, policy: Policy) -> dict[Path, list[dict]]:
        """Return the rows of the CSV files."""
        directory, exit_predictions = self.session.directory, ExitPredictions.from_logits(*test, self.measure)
        ensemble_predictions, ensemble_costs = with_ensemble(
            exit_predictions, test[0], policy.ensemble, self.operations
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
        last_exit_line = (
            f"last exit for every image: {percent(last['acc1'], count)} % of {count:,} test images"
        )
        half = best_within(rows, full / 2)
        if half is None:
            return last_exit_line
        return (
            f"within half of the full operations: {percent(half['test_acc1'], count)} % "
            f"(policy {half['p']} of {len(rows)}, the best on held-out images); {last_exit_line}"
        )

    def _draw_examples(self, logits: Tensor, targets: Tensor, indices: Tensor, policy: Policy) -> None:
        directory, images = self.session.directory, self.data.test
        easy, hard = example_images(logits, targets, policy)
        figure = examples_figure(
            lambda row: images.image(int(indices[row])), targets, (easy, hard), self.data.info.class_names
        )
        save_figure(figure, directory.examples)
        self.session.log.line(
            f"easy and hard images (right at the first exit; only at the last): {directory.examples}"
        )

    def runtime(self) -> None:
        """Measure time, one image at a time and in batches, and predictions by deadlines.

        Raises:
            UserError: There is no policy file, or no image that can be read.
        """
        directory, log, network = self.session.directory, self.session.log, self.network
        if not self.session.processes.is_main:
            return
        log.line("measuring time, half a minute on a small network")
        points = distinct(read_policy(directory.policy, network).of_rule(None), RUNTIME_POLICIES)
        chosen = [batch for batch in self.data.test.spread(RUNTIME_IMAGES) if len(batch[0])]
        if not chosen:
            raise UserError("none of the test images can be read")
        images, targets = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        log.line(
            f"\ntime per image on {images.device}, one at a time and {RUNTIME_BATCHES[-1]} together; "
            f"{len(points)} different policies and every exit"
        )
        rows, block_times = self._measured_rows(points, images, targets.cpu())
        write_csv(directory.runtime, rows)
        full_policy = replace(points[0].policy, thresholds=(NONE_LEAVE,) * network.num_exits)
        acc1 = percent_right(ensemble_classes(self._logits(images), full_policy.ensemble), targets.cpu())
        log.line("\npredicting by deadlines, which takes minutes beside other programs")
        deadlines = deadline_rows(network, images, block_times, acc1, full_policy)
        write_csv(directory.deadlines, deadlines)
        exits = [{"operations": n, "acc1": a} for n, a in zip(self.operations, acc1, strict=True)]
        budgets = [row for row in rows if row["batch_size"] == 1 and row["p"] > 0]
        save_figure(draw_runtime(budgets, exits, deadlines), directory.runtime_figure)
        log.line("the best prediction by a deadline, one image at a time")
        log.line(deadline_table(deadlines, len(targets)))
        files = f"{directory.runtime}, {directory.deadlines}, {directory.runtime_figure}"
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
        # The row of every exit is of a plain pass through the network, which makes no ensemble.
        last_exit_policy = replace(
            points[0].policy, thresholds=(NONE_LEAVE,) * network.num_exits, ensemble=None
        )
        policies = [last_exit_policy, *(point.policy for point in points)]
        predictions = [simulate(logits, policy) for policy in policies]
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
            self.session.log.line(runtime_table(measured, len(targets)))
        return rows, block_times[0]


def calibrated_rows(
    rows: list[dict], logits: Tensor, targets: Tensor, policy: Policy | None
) -> list[dict[str, Any]]:
    """Add calibration errors, and the results of every exit with a policy's temperatures and ensemble.

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
        # Without an ensemble, copy the accuracies: argmax and topk may order equal 16-bit logits differently.
        ensemble_acc1 = [row["acc1"] for row in rows]
        if policy.ensemble is not None:
            ensemble_acc1 = percent_right(ensemble_classes(logits, policy.ensemble), targets)
        columns["ensemble_acc1"] = ensemble_acc1
    return [row | {name: values[k] for name, values in columns.items()} for k, row in enumerate(rows)]


def percent_right(classes: Tensor, targets: Tensor) -> list[float]:
    """Return the top-1 accuracy of classes (K, N) at every exit, with four digits; targets (N,)."""
    return [round(acc1, 4) for acc1 in (100 * (classes == targets).double().mean(dim=1)).tolist()]
