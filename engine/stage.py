"""A stage from its command line to its tables: check, load, train or go on, evaluate."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from args import CommandLine, parse
from dataloader import Data, load_data
from datasets import DataInfo
from engine.checkpoint import Saved, build_network, data_info_from, load_checkpoint, load_saved, load_weights, network_config, plain
from engine.distributed import Processes, is_lost_peer, process_group
from engine.evaluate import Evaluation, known_curves
from engine.log import Log
from engine.provenance import Provenance
from engine.report import draw_curves, millions, pixels, read_csv
from engine.run_directory import RunDirectory
from engine.signals import Interrupted, stop_on_signals
from engine.training import Task, train
from models import IMTA, count_operations
from utils import UserError, seed_everything, set_tf32


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
        trains_backbone: whether gradients go, or batch statistics are taken, through the whole network.
    """

    name: str
    find_origin: Callable[[CommandLine], Saved | None]
    make_network: Callable[[argparse.Namespace, DataInfo, Saved | None], nn.Module]
    make_objective: Callable[[nn.Module, argparse.Namespace], nn.Module]
    constants: Callable[[nn.Module], dict[str, Any]]
    check_result: Callable[[nn.Module, dict[str, Any]], None]
    title: Callable[[argparse.Namespace], str]
    trains_backbone: Callable[[argparse.Namespace], bool]


def run_stage(stage: Stage, argv: list[str] | None) -> int:
    """Do what the command line says.

    Returns:
        The exit status: 0; 1 when a process the run needs was lost; 2 after a mistake; 130 or 143 after SIGINT or SIGTERM.
    """
    command = parse(stage.name, argv)
    status = _status_of(stage, command)
    if status and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Leaving the process group in good order would wait for processes that in turn wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _status_of(stage: Stage, command: CommandLine) -> int:
    try:
        with stop_on_signals(), process_group(command.explicit.get("gpu")) as processes:
            log = Log(processes.is_main)
            try:
                if "evalmode" in command.explicit:
                    _evaluate_only(stage, command, processes, log)
                else:
                    _train_and_evaluate(stage, command, processes, log)
            finally:
                log.close()
    except UserError as error:
        sys.stderr.write(f"train_{stage.name}.py: {error}\n")
        return 2
    except Interrupted as interrupted:
        saved = "saved" if interrupted.is_saved else "what was saved before stays"
        way_on = "" if "evalmode" in command.explicit else "; go on with --resume"
        sys.stderr.write(f"train_{stage.name}.py: stopped by a signal, {saved}{way_on}\n")
        return interrupted.exit_status
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            hint = "try a smaller --batch-size, --accumulate or --checkpoint-activations"
            sys.stderr.write(f"train_{stage.name}.py: there is not enough memory; {hint}\n")
            return 2
        lost = _lost_process(error)
        if lost is None:
            raise
        sys.stderr.write(f"train_{stage.name}.py: {lost}; go on with --resume\n")
        return 1
    return 0


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _lost_process(error: RuntimeError) -> str | None:
    if "DataLoader worker" in str(error):
        return f"a process that loads images was lost ({str(error).splitlines()[0]}); if memory is short, use fewer --workers"
    if is_lost_peer(error):
        return f"another process of this run was lost ({str(error).splitlines()[0][:200]})"
    return None


def _train_and_evaluate(stage: Stage, command: CommandLine, processes: Processes, log: Log) -> None:
    run = RunDirectory(command.save_directory)
    # One process holds the lock for all that belong to the run.
    with run.lock() if processes.is_main else nullcontext():
        state = _state_to_resume(stage, command, run, log)
        origin = stage.find_origin(command) if state is None else None
        if state is not None:
            settings = for_device(stage, command.settings(stored=state["settings"]), processes.device)
            data = load_data(settings, processes.device, processes.shard, data_info_from(state), state["held_out"], state.get("names"))
            network = build_network(state["network"])
            load_weights(network, state["state_dict"], run.last)
            _check_best(run, state)
            constants = {name: state[name] for name in state["constant_names"]}
        else:
            settings = for_device(stage, command.settings(inherited=origin.settings if origin else None), processes.device)
            stored, held_out, names = (origin.data, origin.held_out, origin.names) if origin else (None, None, None)
            data = load_data(settings, processes.device, processes.shard, stored, held_out, names)
            if origin and stored is None:
                _say_class_order(origin, data, log)
            seed_everything(settings.seed, settings.deterministic)
            network = stage.make_network(settings, data.info, origin)
            constants = _constants(stage, settings, data, network, origin)
        seed_everything(settings.seed, settings.deterministic)
        operations = _operations(network, data.info.image_size)
        place(network, settings, processes)
        _describe(network, data, operations, run, processes, log)
        if processes.is_main and state is None:
            _clear(run)
        digest = constants.get("frozen_digest")
        record = (
            Provenance(run.record, str(command), settings, processes, state is not None, digest) if processes.is_main else nullcontext()
        )
        with record:
            log.open(run, state["epoch"] + 1 if state else 0)
            task = Task(network, stage.make_objective(network, settings), constants)
            progress = train(task, data, settings, run, processes, log, state)
            if processes.is_main:
                stage.check_result(network, constants)
            best = load_checkpoint(run.best)
            load_weights(network, best["state_dict"], run.best)
            if processes.is_main:
                stage.check_result(network, constants)
            log.line(f"evaluating the best epoch, {progress.best_epoch} of {settings.epochs}: {run.best}")
            evaluation = Evaluation(network, data, operations, settings.confidence, run, constants, processes, log)
            evaluation.run(["anytime", "dynamic"] if data.val.num_images else ["anytime"])
            if processes.is_main:
                _to_tensorboard(run, constants, settings, log)


def _is_restart(run: RunDirectory) -> bool:
    """Whether torchrun starts all processes again after one was lost (--max-restarts), and the run here is the one they began."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without --rdzv_id every launch has the same name; with it, each machine counts its own restarts alone, and the name tells.
    may_be = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 or launch not in (None, "none")
    return may_be and run.last.exists() and load_checkpoint(run.last).get("launch") == launch


def _state_to_resume(stage: Stage, command: CommandLine, run: RunDirectory, log: Log) -> dict[str, Any] | None:
    if not command.explicit.get("resume") and not _is_restart(run):
        if run.holds_run() and not command.explicit.get("overwrite"):
            raise UserError(f"{run.path} holds a run; --resume goes on with it, --overwrite starts anew, --save DIR goes elsewhere")
        return None
    if not run.last.exists():
        # The log comes after last.pt, best.pt before it: without both the run was killed while it saved for the first time.
        if run.log.exists():
            raise UserError(f"{run.path} holds a run without last.pt, which --resume needs; --overwrite starts anew")
        log.line(f"nothing to resume in {run.path}: starting from scratch")
        return None
    state = load_checkpoint(run.last)
    if state["stage"] != stage.name:
        raise UserError(f"{run.last} was written by train_{state['stage']}.py; go on with that program")
    needed = {"optimizer", "scaler", "random_state", "totals", "constant_names", "epoch", "step", "best_epoch", "best_accuracy", "history"}
    if not needed <= state.keys():
        raise UserError(f"{run.last} lacks what --resume needs; is it a copy of best.pt?")
    command.refuse_changes({"pretrained": state["origin"], **state["settings"]})
    log.line(f"going on with {run.last}: {state['epoch']} epochs and {state['step']} steps are done")
    return state


def _check_best(run: RunDirectory, state: dict[str, Any]) -> None:
    """The best epoch is needed at the end; that its file is of another run should be known before."""
    if state["best_epoch"] and load_checkpoint(run.best)["network"] != state["network"]:
        raise UserError(f"{run.best} holds another network than {run.last}")


def _constants(stage: Stage, settings: argparse.Namespace, data: Data, network: nn.Module, origin: Saved | None) -> dict[str, Any]:
    constants = {
        "stage": stage.name,
        "title": stage.title(settings),
        "network": network_config(network),
        "data": plain(data.info),
        "held_out": data.held_out,
        "names": data.names,
        "settings": {name: plain(value) for name, value in vars(settings).items()},
        "origin": str(origin.path.resolve()) if origin else None,
        "launch": os.environ.get("TORCHELASTIC_RUN_ID"),
        **stage.constants(network),
    }
    return {**constants, "constant_names": [*constants, "constant_names"]}


def _operations(network: nn.Module, image_size: int) -> list[int]:
    try:
        return count_operations(network, image_size)
    except ValueError as error:
        raise UserError(f"--image-size {image_size}: {error}") from None


def for_device(stage: Stage, settings: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """``settings`` with the memory layout chosen, where the flags leave it open.

    The choice for CPUs is the faster one of ``benchmarks/training_speed.py``; that for GPUs has not been measured.
    """
    if settings.channels_last is not None:
        return settings
    # With several threads of a CPU it is faster forwards, and slower backwards.
    channels_last = device.type != "cpu" or torch.get_num_threads() == 1 or not stage.trains_backbone(settings)
    return argparse.Namespace(**{**vars(settings), "channels_last": channels_last})


def place(network: nn.Module, settings: argparse.Namespace, processes: Processes) -> None:
    """Move a network to its device, in the memory layout and precision that the settings ask for."""
    set_tf32(settings.tf32)
    network.to(processes.device, memory_format=torch.channels_last if settings.channels_last else torch.preserve_format)
    trunk = network.backbone if isinstance(network, IMTA) else network
    trunk.checkpoint_activations = settings.checkpoint_activations


def _describe(network: nn.Module, data: Data, operations: list[int], run: RunDirectory, processes: Processes, log: Log) -> None:
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    device = f"{processes.world_size} processes, " * (processes.world_size > 1) + (
        "GPU " + ",".join(map(str, processes.gpu_ids)) if processes.gpu_ids else "CPU"
    )
    for note in data.notes:
        log.line(note)
    log.line(
        f"{data.info.name}: {data.train.num_images:,} training, {data.val.num_images:,} held-out, {data.test.num_images:,} test images"
    )
    log.line(f"{type(network).__name__}: {network.num_exits} exits at {millions(*operations)} operations")
    log.line(f"{total:,} parameters, {trained:,} of them learn; on {device}; into {run.path}")


def _say_class_order(saved: Saved, data: Data, log: Log) -> None:
    if data.sorted_by_name:
        names = ", ".join(data.info.class_names[:3])
        log.line(f"{saved.path} stores no class names: its classes are taken in the order of the folders' names ({names}, ...)")


def _clear(run: RunDirectory) -> None:
    for path in run.results:
        path.unlink(missing_ok=True)
    shutil.rmtree(run.tensorboard, ignore_errors=True)


def _evaluate_only(stage: Stage, command: CommandLine, processes: Processes, log: Log) -> None:
    source = command.explicit.get("evaluate_from") or RunDirectory(command.save_directory).best
    saved = load_saved(source, command.explicit)
    network, settings = saved.network, for_device(stage, command.settings(stored=saved.settings), processes.device)
    data = load_data(settings, processes.device, processes.shard, saved.data, saved.held_out, saved.names)
    if network.num_classes != len(data.info.class_names):
        raise UserError(f"{source} has {network.num_classes} classes, the data set {data.info.name} has {len(data.info.class_names)}")
    operations = _operations(network, data.info.image_size)
    place(network, settings, processes)
    if not saved.state and "save" not in command.explicit:
        raise UserError(f"{source} is of no run of this project: say with --save where its tables go")
    run = RunDirectory(command.explicit.get("save") or source.parent)
    if run.holds_run() and source.resolve() not in (run.best.resolve(), run.last.resolve()):
        raise UserError(f"{run.path} holds another run than {source}; say with --save where its tables go")
    constants = saved.state or {"title": source.stem, "origin": None}
    if not saved.state:
        _say_class_order(saved, data, log)
        if settings.evalmode == "dynamic":
            log.line(f"{source} remembers no held-out split: thresholds are set on images it may have been trained on")
    _describe(network, data, operations, run, processes, log)
    with run.lock() if processes.is_main else nullcontext():
        Evaluation(network, data, operations, settings.confidence, run, constants, processes, log).run([settings.evalmode])


def _to_tensorboard(run: RunDirectory, constants: dict[str, Any], settings: argparse.Namespace, log: Log) -> None:
    log.writer.add_image("accuracy against operations", pixels(draw_curves(known_curves(run, constants))), dataformats="HWC")
    texts = {name: str(value).encode("utf-8", "backslashreplace").decode() for name, value in vars(settings).items()}
    options = {name: value if isinstance(value, (int, float, bool)) else texts[name] for name, value in vars(settings).items()}
    log.writer.add_hparams(options, {f"test_acc1/exit_{row['exit']:.0f}": row["acc1"] for row in read_csv(run.anytime)}, run_name=".")
