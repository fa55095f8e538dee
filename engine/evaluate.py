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

from adaptive_inference import fold, policy_curve, read_policy, write_policy
from adaptive_inference.budgeted import NONE_LEAVE, ExitAnswers, curve_rows, geometric_thresholds
from adaptive_inference.policies import Policy, confidence_by_exit
from adaptive_inference.predictor import simulate
from adaptive_inference.promises.deadlines import deadline_rows
from adaptive_inference.promises.ensemble import (
    calibration_errors,
    classes_together,
    fit_ensemble,
    fit_temperatures,
    operations_together,
)
from adaptive_inference.promises.optimised import optimised_thresholds
from adaptive_inference.promises.risk import rows_with_losses
from adaptive_inference.promises.timing import distinct, measure_blocks, runtime_rows
from dataloader import Batch, Batches, Data
from engine.collect import accuracy_at, anytime_rows, collect_logits, csv_rows
from engine.easy_and_hard import easy_and_hard, examples_figure
from engine.report import draw_curves, draw_runtime, read_csv, save_figure, table, write_csv
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
        has_split: whether the held-out images are known to be new to the network, so that they can test promises.
    """

    def __init__(
        self,
        session: Session,
        network: nn.Module,
        data: Data,
        operations: list[int],
        constants: dict[str, Any],
        has_split: bool = True,
    ):
        settings = session.settings
        self.session, self.data, self.operations, self.constants = session, data, operations, constants
        self.network = fold(network, settings.channels_last, mixed_precision(settings))
        self.measure, self.has_split = settings.measure, has_split

    def run(self, modes: list[str]) -> None:
        """Do the evaluations in ``modes``: ``anytime``, ``dynamic``, ``runtime``.

        Raises:
            UserError: a mode lacks what it needs: held-out images, or a policy file.
        """
        if "dynamic" in modes and self.data.val.num_images == 0:
            raise UserError(
                "budgeted evaluation sets its thresholds on held-out images; this run has none (--val-size 0)"
            )
        if "runtime" in modes:
            with self.session.log.waiting("measuring time, half a minute on a small network"):
                self.runtime()
            return
        with self.session.log.waiting("answering the images"):
            test = collect_logits(self.network, self.data.test, self.session.processes)
            val = (
                collect_logits(self.network, self.data.val, self.session.processes)
                if "dynamic" in modes
                else None
            )
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
        return Policy(
            (NONE_LEAVE,) * len(logits),
            self.measure,
            temperatures,
            fit_ensemble(logits, targets, temperatures),
        )

    def known_policy(self) -> Policy | None:
        """One of the policy file, with its ensemble if there is one, if the file is of this network."""
        try:
            policy = read_policy(self.session.run.policy, self.network).of_rule(None)[0].policy
            return policy if policy.temperatures else None
        except UserError:
            return None

    def anytime(self, logits: Tensor, targets: Tensor, policy: Policy | None) -> None:
        """Every exit on its own; with ``policy`` also its temperatures, what they do to the errors of confidence, and its ensemble."""
        run, rows = self.session.run, anytime_rows(logits, targets, self.operations)
        columns = {"ece": calibration_errors(logits, targets)}
        if policy is not None:
            together = [
                row["acc1"] for row in rows
            ]  # not counted again: equal logits in 16 bits may be ordered otherwise
            if policy.ensemble is not None:
                together = percent_right(classes_together(logits, policy.ensemble), targets)
            columns |= {
                "ece_scaled": calibration_errors(logits, targets, policy.temperatures),
                "temperature": policy.temperatures,
            }
            columns |= {"ensemble_acc1": together}
        rows = [row | {name: values[k] for name, values in columns.items()} for k, row in enumerate(rows)]
        write_csv(run.anytime, rows)
        self.session.log.line(f"\nevery exit on the {len(targets):,} test images ({run.anytime})")
        lazy = count_operations(self.network, self.data.info.image_size, lazy=True)
        shown = [row | {"lazy_operations": n} for row, n in zip(rows, lazy, strict=True)]
        self.session.log.line(
            table(
                shown,
                (
                    "exit",
                    "operations",
                    "lazy_operations",
                    "acc1",
                    "acc5",
                    "ece",
                    "ece_scaled",
                    "ensemble_acc1",
                ),
            )
        )

    def budgeted(self, val_labelled: Labelled, test_labelled: Labelled, policy: Policy) -> None:
        """Budgeted batch prediction by both rules and with ``policy``'s ensemble, the policy file, and a picture of easy and hard images.
        Images come as logits (K, N, C) and targets (N,)."""
        run, log, full = self.session.run, self.session.log, self.operations[-1]
        labelled = val_labelled, test_labelled
        val, test = (
            ExitAnswers(*confidence_by_exit(logits, self.measure), targets) for logits, targets in labelled
        )
        curves = {
            "geometric": curve_rows(geometric_thresholds(val.confidence), val, test, self.operations),
            "optimised": curve_rows(optimised_thresholds(val, self.operations), val, test, self.operations),
            "tested": rows_with_losses(val, self.operations) if self.has_split else [],
        }
        if policy.ensemble is not None:
            both = zip((val, test), labelled, strict=True)
            val, test = (
                alone._replace(classes=classes_together(logits, policy.ensemble))
                for alone, (logits, _) in both
            )
            spent = operations_together(self.operations, self.network.num_classes)
            curves["ensemble"] = curve_rows(optimised_thresholds(val, spent), val, test, spent)
        curve = policy_curve(
            self.network, self.operations, curves, self.measure, policy.temperatures, policy.ensemble
        )
        write_policy(run.policy, curve)
        rules = {
            run.budgeted: "geometric",
            run.optimised: "optimised",
            run.ensemble: "ensemble" if policy.ensemble else "optimised",
        }
        tables = {path: csv_rows(curves[rule]) for path, rule in rules.items()}
        for path, rows in tables.items():
            write_csv(path, rows)
        log.line(
            f"\nbudgeted batch prediction, every fourth of {len(rows)} budgets ({', '.join(map(str, tables))})"
        )
        exits = {f"share_{k}": f"exit {k} %" for k in range(1, len(self.operations) + 1)}
        shown = []
        for row, *others in list(zip(*tables.values(), strict=True))[3::4]:
            best = (
                f"{other['test_acc1']:.2f} at {100 * other['operations'] / full:.0f} %" for other in others
            )
            shares = {title: f"{100 * row[name]:.0f}" for name, title in exits.items()}
            shares |= zip(("optimised rule", "ensemble of exits"), best, strict=True)
            shown.append({**row, "share_of_operations": 100 * row["operations"] / full, **shares})
        log.line(table(shown, ("p", "operations", "share_of_operations", "test_acc1", *shares)))
        test_logits, test_targets = test_labelled
        half = accuracy_at(tables[run.budgeted], full / 2)
        if half is not None:
            (last,) = anytime_rows(test_logits[-1:], test_targets, [full])
            log.line(
                f"within half of the full operations: {half['test_acc1']:.2f} % (p = {half['p']}, the best on held-out images); "
                f"last exit for every image: {last['acc1']:.2f} %"
            )
        log.line(f"thresholds for predict.py: {run.policy}")
        easy, hard = easy_and_hard(test_logits, test_targets, curve.nearest(full / 2, "optimised").policy)
        figure = examples_figure(self.data.test.picture, test_targets, easy, hard, self.data.info.class_names)
        save_figure(figure, run.examples)
        log.line(f"images that left first and right, and that only the last exit got right: {run.examples}")

    def runtime(self) -> None:
        """Measured time beside counted operations, for images one at a time and in batches, and answers by deadlines."""
        run, log, form = self.session.run, self.session.log, self.network
        if not self.session.processes.is_main:
            return
        points = distinct(read_policy(run.policy, form).of_rule(None), RUNTIME_POLICIES)
        images, targets = (
            torch.cat(parts) for parts in zip(*_spread(self.data.test, RUNTIME_IMAGES), strict=True)
        )
        log.line(
            f"\ntime an image on {images.device}, one at a time and {RUNTIME_BATCHES[-1]} together, of which images leave as they are "
            f"answered; {len(points)} different policies and every exit"
        )
        with torch.inference_mode():
            logits = torch.cat(
                [torch.stack(form(part)).float().cpu() for part in images.split(RUNTIME_BATCHES[-1])], dim=1
            )
        targets = targets.cpu()
        everything = replace(points[0].policy, thresholds=(NONE_LEAVE,) * form.num_exits)
        answers = [
            simulate(logits, policy)
            for policy in (replace(everything, ensemble=None), *(point.policy for point in points))
        ]
        lazy = count_operations(form, self.data.info.image_size, lazy=True)
        costs = torch.tensor([self.operations, lazy], dtype=torch.float64)
        rows = []
        for batch_size in RUNTIME_BATCHES:
            times = measure_blocks(form, images[:1], batch_size)
            log.line(str(times))
            if batch_size == 1:
                single = times
            measured = runtime_rows(form, points, images, times)
            for row, answer in zip(measured, answers, strict=True):
                row["operations"], row["lazy_operations"] = (
                    costs[:, answer.exits].mean(dim=1).round().long().tolist()
                )
                (row["acc1"],) = percent_right(answer.classes[None], targets)
            rows += measured
            log.line(_runtime_table(measured))
        acc1 = percent_right(classes_together(logits, everything.ensemble), targets)
        deadlines = deadline_rows(form, images, single, acc1, everything)
        write_csv(run.runtime, rows)
        write_csv(run.runtime.with_name("deadline.csv"), deadlines)
        exits = [
            {"operations": n, "acc1": accuracy} for n, accuracy in zip(self.operations, acc1, strict=True)
        ]
        budgets = [row for row in rows if row["batch_size"] == 1 and row["p"] > 0]
        save_figure(draw_runtime(budgets, exits, deadlines), run.runtime_picture)
        log.line("\nthe best answer by a deadline, one image at a time")
        shown = [
            {"deadline ms": row["milliseconds"], "acc1": row["acc1"], "late %": 100 * row["late"]}
            for row in deadlines
        ]
        log.line(table(shown, list(shown[0])))
        log.line(
            f"{len(targets):,} test images; {run.runtime}, deadline.csv beside it, {run.runtime_picture}"
        )


def percent_right(classes: Tensor, targets: Tensor) -> list[float]:
    """Of classes (K, N) at every exit, targets (N,); four digits."""
    return [round(percent, 4) for percent in (100 * (classes == targets).double().mean(dim=1)).tolist()]


def _runtime_table(rows: list[dict]) -> str:
    """Of rows that begin with that of running every exit."""
    full = {"share_of_operations": "operations", "share_of_time": "milliseconds"}
    shown = [
        {
            **row,
            "p": row["p"] or "every exit",
            **{title: 100 * row[name] / rows[0][name] for title, name in full.items()},
        }
        for row in rows
    ]
    names = (
        "batch_size",
        "p",
        "operations",
        "lazy_operations",
        "share_of_operations",
        "milliseconds",
        "expected_milliseconds",
    )
    return table(shown, (*names, "share_of_time", "acc1"))


def known_curves(
    run: RunDirectory, constants: dict[str, Any]
) -> dict[str, tuple[list[dict], list[dict], list[dict]]]:
    """Curves of this run, after those of the run it started from: rows of the anytime, budgeted and optimised files, by title."""
    directories = {"stage 1": RunDirectory(Path(constants["origin"]).parent)} if constants["origin"] else {}
    curves = {}
    for title, directory in {**directories, constants["title"]: run}.items():
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
            complain(f"{error}; the curves of {title} are left out")
            continue
        if any(rows):
            curves[title] = rows
    return curves


def _spread(batches: Batches, count: int) -> Iterable[Batch]:
    """About ``count`` images, evenly spread: in many data sets classes come one after another."""
    chosen = batches.own()
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(count, len(chosen))).long()]
    part = copy.copy(batches)
    part.own = lambda: chosen
    return part
