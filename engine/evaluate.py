"""The evaluations of a network: tables on the terminal, files in its directory.

Evaluation(session, network, data, operations, constants).run(["anytime", "dynamic"])
"""

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_inference import confidence_and_answers, inference_form, optimised_rows, policy_curve, read_policy, write_policy
from adaptive_inference.budgeted import NONE_LEAVE
from adaptive_inference.ensemble import calibration_errors, classes_together, fit_ensemble, fit_temperatures
from adaptive_inference.examples import easy_and_hard, examples_figure
from adaptive_inference.policies import Policy, confidence_by_exit
from adaptive_inference.predictor import simulate
from adaptive_inference.risk import rows_with_losses
from adaptive_inference.timing import deadline_rows, distinct, draw_runtime, measure_blocks, runtime_rows
from dataloader import Batch, Batches, Data
from engine.collect import accuracy_at, anytime_rows, budget_curves, collect_logits, csv_rows
from engine.report import draw_curves, millions, read_csv, save_figure, table, write_csv
from engine.run_directory import RunDirectory
from engine.session import Session
from engine.stepper import mixed_precision
from models import count_operations
from utils import UserError, complain

RUNTIME_IMAGES = 1024
RUNTIME_BATCHES = (1, 64)
RUNTIME_POLICIES = 10

Labelled = tuple[Tensor, Tensor]


class Evaluation:
    """Evaluates ``network`` on ``data`` and writes into the run's directory; only the main process writes and prints.

    The network is evaluated in the form in which it answers, folded and in the precision of ``--amp``, so that thresholds hold there.

    Args:
        operations: to each exit.
        constants: ``title`` of the network's curves, and ``origin``, the checkpoint it started from, or None.
    """

    def __init__(self, session: Session, network: nn.Module, data: Data, operations: list[int], constants: dict[str, Any]):
        settings = session.settings
        self.session, self.data, self.operations, self.constants = session, data, operations, constants
        self.network = inference_form(network, settings.channels_last, mixed_precision(settings))
        self.measure = settings.measure

    def run(self, modes: list[str]) -> None:
        """Do the evaluations in ``modes``: ``anytime``, ``dynamic``, ``runtime``.

        Raises:
            UserError: a mode lacks what it needs: held-out images, or a policy file.
        """
        if "dynamic" in modes and self.data.val.num_images == 0:
            raise UserError("budgeted evaluation sets its thresholds on held-out images; this run has none (--val-size 0)")
        if "runtime" in modes:
            with self.session.log.waiting("measuring time, half a minute on a small network"):
                self.runtime()
            return
        with self.session.log.waiting("answering the images"):
            test = collect_logits(self.network, self.data.test, self.session.processes)
            val = collect_logits(self.network, self.data.val, self.session.processes) if "dynamic" in modes else None
        if not self.session.processes.is_main:
            return
        policy = self.fitted(*val) if val is not None else self.known_policy()
        if "anytime" in modes:
            self.anytime(*test, policy)
        if "dynamic" in modes:
            self.budgeted(val, test, policy)
        save_figure(draw_curves(known_curves(self.session.run, self.constants)), self.session.run.curves)
        self.session.log.line(f"accuracy against operations: {self.session.run.curves}")

    def fitted(self, logits: Tensor, targets: Tensor) -> Policy:
        """How answers are made, from those to held-out images; no image leaves."""
        temperatures = tuple(fit_temperatures(logits, targets))
        return Policy((NONE_LEAVE,) * len(logits), self.measure, temperatures, fit_ensemble(logits, targets, temperatures))

    def known_policy(self) -> Policy | None:
        """One of the policy file, with its ensemble if there is one, if the file is of this network."""
        try:
            policy = read_policy(self.session.run.policy, self.network).of_rule(None)[0].policy
            return policy if policy.temperatures else None
        except UserError:
            return None

    def anytime(self, logits: Tensor, targets: Tensor, policy: Policy | None) -> None:
        """Every exit on its own; with ``policy`` also its temperatures, what they do to the errors of confidence, and its ensemble."""
        rows = anytime_rows(logits, targets, self.operations)
        for row, error in zip(rows, calibration_errors(logits, targets), strict=True):
            row["ece"] = round(error, 3)
        if policy is not None:
            errors = calibration_errors(logits, targets, policy.temperatures)
            together = [row["acc1"] for row in rows]  # not counted again: equal logits in 16 bits may be ordered otherwise
            if policy.ensemble is not None:
                together = percent_right(classes_together(logits, policy.ensemble), targets)
            for row, error, temperature, accuracy in zip(rows, errors, policy.temperatures, together, strict=True):
                row |= {"ece_scaled": round(error, 3), "temperature": temperature, "ensemble_acc1": round(accuracy, 4)}
        write_csv(self.session.run.anytime, rows)
        lazy = count_operations(self.network, self.data.info.image_size, lazy=True)
        self.session.log.line(f"\nevery exit on the {len(targets):,} test images ({self.session.run.anytime})")
        cells = [
            [str(row["exit"]), millions(row["operations"]), millions(n), f"{row['acc1']:.2f}", f"{row['acc5']:.2f}"]
            + [f"{row[name]:.2f}" for name in ("ece", "ece_scaled", "ensemble_acc1") if name in row]
            for row, n in zip(rows, lazy, strict=True)
        ]
        header = ["exit", "operations", "evaluated lazily", "top-1 %", "top-5 %", "ECE %"]
        header += ["ECE % scaled", "ensemble top-1 %"] if policy else []
        self.session.log.line(table(header, cells))

    def budgeted(self, val_answers: Labelled, test_answers: Labelled, policy: Policy) -> None:
        """Budgeted batch prediction by both rules and with ``policy``'s ensemble, the policy file, and a picture of easy and hard images.
        Answers are logits (K, N, C) and targets (N,)."""
        run, full = self.session.run, self.operations[-1]
        (val_logits, val_targets), (test_logits, test_targets) = val_answers, test_answers
        last_exit = anytime_rows(test_logits[-1:], test_targets, self.operations[-1:])[0]["acc1"]
        confidence, classes = confidence_by_exit(val_logits, self.measure)
        test = confidence_and_answers(test_logits, test_targets, self.measure)
        curves = budget_curves((confidence, classes == val_targets), test, self.operations)
        rows, optimised = csv_rows(curves.geometric), csv_rows(curves.optimised)
        write_csv(run.budgeted, rows)
        write_csv(run.optimised, optimised)
        by_rule = {**curves._asdict(), "tested": rows_with_losses(confidence, classes, val_targets, self.operations)}
        together = curves.optimised
        if policy.ensemble is not None:
            val_right, test_right = (
                classes_together(logits, policy.ensemble) == targets for logits, targets in (val_answers, test_answers)
            )
            # The answer at exit k adds k times as many operations as there are classes.
            spent = [n + k * val_logits.shape[2] for k, n in enumerate(self.operations, start=1)]
            together = by_rule["ensemble"] = optimised_rows(confidence, val_right, test[0], test_right, spent)
        write_csv(run.ensemble, csv_rows(together))
        curve = policy_curve(self.network, self.operations, by_rule, self.measure, policy.temperatures, policy.ensemble)
        write_policy(run.policy, curve)
        exits = range(1, len(self.operations) + 1)
        self.session.log.line(
            f"\nbudgeted batch prediction, every fourth of {len(rows)} budgets ({run.budgeted}, {run.optimised}, {run.ensemble})"
        )
        cells = [
            [str(row["p"]), millions(row["operations"]), f"{100 * row['operations'] / full:.0f}", f"{row['test_acc1']:.2f}"]
            + [f"{100 * row[f'share_{k}']:.0f}" for k in exits]
            + [f"{best['test_acc1']:.2f} at {100 * best['operations'] / full:.0f} %" for best in others]
            for row, *others in list(zip(rows, optimised, together, strict=True))[3::4]
        ]
        header = ["p", "operations", "% of full", "top-1 %", *(f"exit {k} %" for k in exits), "optimised rule", "ensemble of exits"]
        self.session.log.line(table(header, cells))
        half = accuracy_at(rows, full / 2)
        if half is not None:
            self.session.log.line(
                f"within half of the full operations: {half['test_acc1']:.2f} % (p = {half['p']}, the best on held-out images); "
                f"last exit for every image: {last_exit:.2f} %"
            )
        self.session.log.line(f"thresholds for predict.py: {run.policy}")
        easy, hard = easy_and_hard(test_logits, test_targets, curve.nearest(full / 2, "optimised").policy)
        figure = examples_figure(self.data.test.picture, test_targets, easy, hard, self.data.info.class_names)
        save_figure(figure, run.examples)
        self.session.log.line(f"images that left first and right, and that only the last exit got right: {run.examples}")

    def runtime(self) -> None:
        """Measured time beside counted operations, for images one at a time and in batches, and answers by deadlines."""
        run, device = self.session.run, self.session.processes.device
        if not self.session.processes.is_main:
            return
        curve, form = read_policy(run.policy, self.network), self.network
        images, targets = (torch.cat(parts) for parts in zip(*_spread(self.data.test, RUNTIME_IMAGES), strict=True))
        points = distinct(curve.of_rule(None), RUNTIME_POLICIES)
        self.session.log.line(
            f"\ntime an image on {device}, one image at a time (batch 1) and {RUNTIME_BATCHES[-1]} together, of which images leave as they "
            f"are answered; {len(points)} different policies and every exit"
        )
        with torch.inference_mode():
            logits = torch.cat([torch.stack(form(part)).float().cpu() for part in images.split(RUNTIME_BATCHES[-1])], dim=1)
        targets = targets.cpu()
        known = points[0].policy
        acc1 = percent_right(classes_together(logits, known.ensemble), targets)
        last = Policy((NONE_LEAVE,) * len(acc1))
        answers = [simulate(logits, policy) for policy in (last, *(point.policy for point in points))]
        lazy = count_operations(self.network, self.data.info.image_size, lazy=True)
        rows = []
        for batch_size in RUNTIME_BATCHES:
            times = measure_blocks(form, images[:1], batch_size)
            if batch_size == 1:
                single = times
            for row, answer in zip(runtime_rows(form, points, images, times), answers, strict=True):
                means = {
                    name: round(torch.tensor(counts, dtype=torch.float64)[answer.exits].mean().item())
                    for name, counts in (("operations", self.operations), ("lazy_operations", lazy))
                }
                right = 100 * (answer.classes == targets).double().mean().item()
                rows.append({**row, **means, "acc1": round(right, 4)})
            self.session.log.line(_runtime_table(rows[-len(answers) :], self.operations[-1]))
        deadlines = deadline_rows(form, images, single, acc1, replace(known, thresholds=last.thresholds))
        write_csv(run.runtime, rows)
        write_csv(run.runtime.with_name("deadline.csv"), deadlines)
        exits = [{"operations": n, "acc1": accuracy} for n, accuracy in zip(self.operations, acc1, strict=True)]
        save_figure(draw_runtime(rows, deadlines, exits), run.runtime_picture)
        cells = [[f"{row['milliseconds']:.2f}", f"{row['acc1']:.2f}", f"{100 * row['late']:.1f}"] for row in deadlines]
        self.session.log.line("\nthe best answer by a deadline, one image at a time")
        self.session.log.line(table(["deadline ms", "top-1 %", "late %"], cells))
        self.session.log.line(f"{len(targets):,} test images; {run.runtime}, deadline.csv beside it, {run.runtime_picture}")


def percent_right(classes: Tensor, targets: Tensor) -> list[float]:
    """Of classes (K, N) at every exit, targets (N,)."""
    return (100 * (classes == targets).double().mean(dim=1)).tolist()


def _runtime_table(rows: list[dict], full: int) -> str:
    cells = [
        [
            *(str(row["batch_size"]), str(row["p"] or "every exit"), millions(row["operations"]), millions(row["lazy_operations"])),
            *(f"{100 * row['operations'] / full:.0f}", f"{row['milliseconds']:.3f}", f"{row['expected_milliseconds']:.3f}"),
            *(f"{100 * row['milliseconds'] / rows[0]['milliseconds']:.0f}", f"{row['acc1']:.2f}"),
        ]
        for row in rows
    ]
    header = ["batch", "p", "operations", "evaluated lazily", "% of full", "ms an image", "expected", "% of full time", "top-1 %"]
    return table(header, cells)


def known_curves(run: RunDirectory, constants: dict[str, Any]) -> dict[str, tuple[list[dict], list[dict], list[dict]]]:
    """Curves of this run, after those of the run it started from: rows of the anytime, budgeted and optimised files, by title."""
    directories = {constants["title"]: run}
    if constants["origin"]:
        directories = {"stage 1": RunDirectory(Path(constants["origin"]).parent), **directories}

    def tables(directory: RunDirectory) -> tuple[list[dict], list[dict], list[dict]]:
        shown = {directory.anytime: "acc1", directory.budgeted: "test_acc1", directory.optimised: "test_acc1"}
        return tuple(_rows_to_draw(path, accuracy) for path, accuracy in shown.items())

    curves = {title: tables(directory) for title, directory in directories.items()}
    return {title: rows for title, rows in curves.items() if any(rows)}


def _spread(batches: Batches, count: int) -> Iterable[Batch]:
    """About ``count`` images, evenly spread: in many data sets classes come one after another."""
    chosen = batches.own()
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(count, len(chosen))).long()]
    part = copy.copy(batches)
    part.own = lambda: chosen
    return part


def _rows_to_draw(path: Path, accuracy: str) -> list[dict]:
    try:
        return read_csv(path, ("operations", accuracy)) if path.exists() else []
    except UserError as error:  # an old table is no reason to stop, after new ones were written
        complain(f"{error}; its curve is left out")
        return []
