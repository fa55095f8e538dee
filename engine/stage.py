"""A stage from its command line to its tables: check, load, train or go on, evaluate."""

import argparse
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from args import CommandLine, parse
from dataloader import Data, DataInfo, load_data
from engine.checkpoint import Saved, build_network, data_info_from, load_checkpoint, load_saved, load_weights, network_config, plain
from engine.distributed import Processes, process_group
from engine.evaluation import accuracy_at, anytime_rows, budgeted_rows, collect_logits, softmax_
from engine.log import Log
from engine.report import draw_curves, pixels, read_csv, save_figure, table, write_csv
from engine.run_directory import RunDirectory
from engine.training import Interrupted, Task, train
from models import count_operations
from utils import UserError, seed_everything

INTERRUPTED_HINT = "stopped by a signal and saved; go on with --resume"


@dataclass(frozen=True)
class Stage:
    """What distinguishes a stage.

    Args:
        name: as in ``args`` and in directory names.
        find_origin: the checkpoint to start from, None to start from scratch.
        make_network: new network for settings, data and origin.
        make_objective: module (images, targets) -> (losses (N,), logits (N, K, C)).
        constants: further entries of the checkpoints.
        check_result: raises a UserError if training did what it must not.
        title: of the stage's curves.
    """

    name: str
    find_origin: Callable[[CommandLine], Saved | None]
    make_network: Callable[[argparse.Namespace, DataInfo, Saved | None], nn.Module]
    make_objective: Callable[[nn.Module, argparse.Namespace], nn.Module]
    constants: Callable[[nn.Module], dict[str, Any]]
    check_result: Callable[[nn.Module, dict[str, Any]], None]
    title: Callable[[argparse.Namespace], str]


def run_stage(stage: Stage, argv: list[str] | None) -> int:
    """Do what the command line says; returns the exit status: 0, 2 after a mistake, 130 or 143 after SIGINT or SIGTERM."""
    command = parse(stage.name, argv)
    try:
        with process_group(command.explicit.get("gpu")) as processes:
            log = Log(processes.is_main)
            try:
                if "evalmode" in command.explicit:
                    _evaluate_only(command, processes, log)
                else:
                    _train_and_evaluate(stage, command, processes, log)
            finally:
                log.close()
    except UserError as error:
        sys.stderr.write(f"train_{stage.name}.py: {error}\n")
        return 2
    except Interrupted as interrupted:
        sys.stderr.write(f"train_{stage.name}.py: {INTERRUPTED_HINT}\n")
        return interrupted.exit_status
    except KeyboardInterrupt:
        sys.stderr.write(f"train_{stage.name}.py: interrupted; what was saved before stays\n")
        return 130
    return 0


def _train_and_evaluate(stage: Stage, command: CommandLine, processes: Processes, log: Log) -> None:
    run = RunDirectory(command.save_directory)
    # One process holds the lock for all that belong to the run.
    with run.lock() if processes.is_main else nullcontext():
        state = _state_to_resume(stage, command, run, log)
        origin = stage.find_origin(command) if state is None else None
        if state is not None:
            settings = command.settings(stored=state["settings"])
            data = load_data(settings, processes.device, processes.shard, data_info_from(state), state["held_out"])
            network = build_network(state["network"])
            load_weights(network, state["state_dict"], run.last)
            constants = {name: state[name] for name in state["constant_names"]}
        else:
            settings = command.settings(inherited=origin.settings if origin else None)
            stored, held_out = (origin.data, origin.held_out) if origin else (None, None)
            data = load_data(settings, processes.device, processes.shard, stored, held_out)
            seed_everything(settings.seed, settings.deterministic)
            network = stage.make_network(settings, data.info, origin)
            constants = _constants(stage, settings, data, network, origin)
        seed_everything(settings.seed, settings.deterministic)
        operations = _operations(network, data.info.image_size)
        _place(network, settings, processes)
        _describe(network, data, operations, run, processes, log)
        if state is None and processes.is_main:
            _clear(run)
        log.open(run, state["epoch"] + 1 if state else 0)
        task = Task(network, stage.make_objective(network, settings), constants)
        progress = train(task, data, settings, run, processes, log, state)
        if processes.is_main:
            stage.check_result(network, constants)
        best = load_checkpoint(run.best)
        load_weights(network, best["state_dict"], run.best)
        log.line(f"evaluating the best epoch, {progress.best_epoch} of {settings.epochs}: {run.best}")
        results = _evaluate(network, data, operations, ("anytime", "dynamic"), run, constants, processes, log)
        _to_tensorboard(results, settings, log)


def _state_to_resume(stage: Stage, command: CommandLine, run: RunDirectory, log: Log) -> dict[str, Any] | None:
    if not command.explicit.get("resume"):
        if run.holds_run() and not command.explicit.get("overwrite"):
            raise UserError(f"{run.path} holds a run; --resume goes on with it, --overwrite starts anew, --save DIR goes elsewhere")
        return None
    if not run.last.exists():
        log.line(f"nothing to resume in {run.path}: starting from scratch")
        return None
    state = load_checkpoint(run.last)
    if state["stage"] != stage.name:
        raise UserError(f"{run.last} was written by train_{state['stage']}.py; go on with that program")
    command.refuse_changes(state["settings"])
    log.line(f"going on with {run.last}: {state['epoch']} epochs and {state['step']} steps are done")
    return state


def _constants(stage: Stage, settings: argparse.Namespace, data: Data, network: nn.Module, origin: Saved | None) -> dict[str, Any]:
    constants = {
        "stage": stage.name,
        "title": stage.title(settings),
        "network": network_config(network),
        "data": plain(data.info),
        "held_out": data.held_out,
        "settings": {name: plain(value) for name, value in vars(settings).items()},
        "origin": str(origin.path) if origin else None,
        **stage.constants(network),
    }
    return {**constants, "constant_names": [*constants, "constant_names"]}


def _operations(network: nn.Module, image_size: int) -> list[int]:
    try:
        return count_operations(network, image_size)
    except ValueError as error:
        raise UserError(f"--image-size {image_size}: {error}") from None


def _place(network: nn.Module, settings: argparse.Namespace, processes: Processes) -> None:
    network.to(processes.device, memory_format=torch.channels_last if settings.channels_last else torch.preserve_format)


def _describe(network: nn.Module, data: Data, operations: list[int], run: RunDirectory, processes: Processes, log: Log) -> None:
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    device = f"{processes.world_size} processes, " * (processes.world_size > 1) + (
        "GPU " + ",".join(map(str, processes.gpu_ids)) if processes.gpu_ids else "CPU"
    )
    log.line(
        f"{data.info.name}: {data.train.num_images:,} training, {data.val.num_images:,} held-out, {data.test.num_images:,} test images"
    )
    log.line(f"{type(network).__name__}: {network.num_exits} exits at {_millions(operations)} million operations")
    log.line(f"{total:,} parameters, {trained:,} of them learn; on {device}; into {run.path}")


def _millions(operations: list[int]) -> str:
    return " / ".join(f"{n / 1e6:.2f}" for n in operations)


def _clear(run: RunDirectory) -> None:
    for path in (run.last, run.best, run.log, run.anytime, run.budgeted, run.curves):
        path.unlink(missing_ok=True)
    shutil.rmtree(run.tensorboard, ignore_errors=True)


def _evaluate_only(command: CommandLine, processes: Processes, log: Log) -> None:
    source = command.explicit.get("evaluate_from") or RunDirectory(command.save_directory).best
    saved = load_saved(source, command.explicit)
    network, settings = saved.network, command.settings(stored=saved.settings)
    data = load_data(settings, processes.device, processes.shard, saved.data, saved.held_out)
    if network.num_classes != len(data.info.class_names):
        raise UserError(f"{source} has {network.num_classes} classes, the data set {data.info.name} has {len(data.info.class_names)}")
    operations = _operations(network, data.info.image_size)
    _place(network, settings, processes)
    run = RunDirectory(command.explicit.get("save") or source.parent)
    constants = saved.state or {"title": source.stem, "origin": None}
    if not saved.state:
        log.line(f"{source} remembers no held-out split: thresholds are set on images it may have been trained on")
    _describe(network, data, operations, run, processes, log)
    _evaluate(network, data, operations, (settings.evalmode,), run, constants, processes, log)


@dataclass(frozen=True)
class Results:
    """Rows of the tables that were made, and the picture of them."""

    anytime: list[dict]
    budgeted: list[dict]
    curves: dict[str, tuple[list[dict], list[dict]]]


def _evaluate(
    network: nn.Module,
    data: Data,
    operations: list[int],
    modes: tuple[str, ...],
    run: RunDirectory,
    constants: dict[str, Any],
    processes: Processes,
    log: Log,
) -> Results | None:
    """Write and print the tables of ``modes`` and draw all that the directory holds; only the main process has results."""
    if "dynamic" in modes and data.val.num_images == 0:
        if modes == ("dynamic",):
            raise UserError("budgeted evaluation sets its thresholds on held-out images; this run has none (--val-size 0)")
        modes = ("anytime",)
    test_logits, test_targets = collect_logits(network, data.test, processes)
    val_logits, val_targets = collect_logits(network, data.val, processes) if "dynamic" in modes else (None, None)
    if not processes.is_main:
        return None
    if "anytime" in modes:
        rows = anytime_rows(test_logits, test_targets, operations)
        write_csv(run.anytime, rows)
        log.line(f"\nevery exit on the {data.test.num_images:,} test images ({run.anytime})")
        cells = [[str(r["exit"]), f"{r['operations'] / 1e6:.2f} M", f"{r['acc1']:.2f}", f"{r['acc5']:.2f}"] for r in rows]
        log.line(table(["exit", "operations", "top-1 %", "top-5 %"], cells))
    if "dynamic" in modes:
        full = operations[-1]
        last_exit = anytime_rows(test_logits[-1:], test_targets, operations[-1:])[0]["acc1"]
        rows = budgeted_rows(softmax_(val_logits), val_targets, softmax_(test_logits), test_targets, operations)
        write_csv(run.budgeted, rows)
        log.line(f"\nbudgeted batch prediction, every fourth of {len(rows)} budgets ({run.budgeted})")
        cells = [
            [str(r["p"]), f"{r['operations'] / 1e6:.2f} M", f"{100 * r['operations'] / full:.0f}", f"{r['test_acc1']:.2f}"]
            + [f"{100 * r[f'share_{k}']:.0f}" for k in range(1, len(operations) + 1)]
            for r in rows[3::4]
        ]
        log.line(table(["p", "operations", "% of full", "top-1 %", *(f"exit {k} %" for k in range(1, len(operations) + 1))], cells))
        half = accuracy_at(rows, full / 2)
        if half is not None:
            log.line(f"within half of the full operations: {half['test_acc1']:.2f} %; last exit for every image: {last_exit:.2f} %")
    curves = _known_curves(run, constants)
    save_figure(draw_curves(curves), run.curves)
    log.line(f"accuracy against operations: {run.curves}")
    return Results(*curves[constants["title"]], curves)


def _known_curves(run: RunDirectory, constants: dict[str, Any]) -> dict[str, tuple[list[dict], list[dict]]]:
    """Curves of this run, after those of the run it started from."""
    directories = {constants["title"]: run}
    if constants["origin"]:
        directories = {"stage 1": RunDirectory(Path(constants["origin"]).parent), **directories}
    curves = {
        title: tuple(read_csv(path) if path.exists() else [] for path in (directory.anytime, directory.budgeted))
        for title, directory in directories.items()
    }
    return {title: rows for title, rows in curves.items() if any(rows)}


def _to_tensorboard(results: Results | None, settings: argparse.Namespace, log: Log) -> None:
    if results is None or log.writer is None:
        return
    log.writer.add_image("accuracy against operations", pixels(draw_curves(results.curves)), dataformats="HWC")
    options = {name: value if isinstance(value, (int, float, bool)) else str(value) for name, value in vars(settings).items()}
    log.writer.add_hparams(options, {f"test_acc1/exit_{row['exit']:.0f}": row["acc1"] for row in results.anytime}, run_name=".")
