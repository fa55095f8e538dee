"""A run from its command line to its tables: check, load, train or resume, evaluate.

status = run(parse("GE", argv), Stage1())
"""

import os
import shlex
import shutil
from abc import ABC, abstractmethod
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptive_inference import read_policy
from args import CommandLine, from_record
from dataloader import Data, load_data
from engine.checkpoint import Saved, damage_named, load_checkpoint, load_saved
from engine.compiling import is_compiler_error, reason_of, usable_mode
from engine.device import is_out_of_memory, seed_everything, set_tf32
from engine.distributed import Processes, is_lost_peer, launch_of_environment, process_group
from engine.evaluate import Evaluation, known_curves
from engine.launch import CopyEnded, leave_copy, shared_out
from engine.log import Log
from engine.precision import half_precision
from engine.record import RunDirectory, Session, commit, plain, recorded
from engine.report import draw_curves, millions, read_csv
from engine.signals import Interrupted, Requests, listening
from engine.stepper import refuse_combinations
from engine.trainer import FEW_IMAGES, train
from models import Description, ExitNetwork, count_operations
from models.description import DataInfo, Split
from models.files import find
from models.layers import set_memory_format
from models.network import network_options
from models.saved import load_weights, with_weights
from models.zoo import Preprocessing
from utils import UserError, complain, in_words, one_line

# Compile only above this many forward operations per process; below it, compiling costs more than it saves.
COMPILING_PAYS = 5e12


class Stage(ABC):
    """What a stage trains.

    Attributes:
        name: Name of the stage in ``args`` and in directories.
        may_change_data: Whether it may train on other data than the network it starts from.
        next_command: What to do with the finished run; it ends with the run's directory.
    """

    name: str
    may_change_data = False
    next_command: str

    def find_origin(self, command: CommandLine) -> Saved | None:
        """Load the network to start from, None to start from scratch.

        Raises:
            UserError, OSError: It is not there, cannot be read, or is another network than the flags say.
        """
        path = command.typed.get("pretrained")
        if (
            path is None or command.typed.get("arch", "msdnet") != "msdnet"
        ):  # then it names weights of a library
            return None
        return load_saved(path, command.typed)

    def preprocessing(self, settings: Namespace, origin: Saved | None) -> DataInfo | Preprocessing | None:
        """Return what the weights to start from expect of images, None to start from scratch."""
        return origin.data if origin else None

    @abstractmethod
    def make_network(self, settings: Namespace, data: DataInfo, origin: Saved | None) -> ExitNetwork:
        """Build the network to train."""

    @abstractmethod
    def make_objective(self, network: ExitNetwork, settings: Namespace) -> nn.Module:
        """Build the module (images, targets) -> (losses (N,), logits (N, K, C)) that trains ``network``.

        It is too late to refuse anything here: with --overwrite the old run is gone.
        """

    @abstractmethod
    def title(self, settings: Namespace) -> str:
        """Return the title of a run's curves."""

    def frozen_digest(self, network: ExitNetwork) -> str | None:
        """Return a digest of what must not change, None if everything may."""
        return None

    def check_result(self, network: ExitNetwork, description: Description) -> None:
        """Compare what is frozen with what it was.

        Raises:
            UserError: It moved.
        """
        if self.frozen_digest(network) != description.frozen_digest:
            raise UserError(
                "the frozen stage-1 network changed during stage 2; its classifiers do not belong to it any "
                "more"
            )

    def share_of_work(self, settings: Namespace) -> float:
        """Return the share of a whole training's operations that compiling makes faster on a CPU."""
        return 1.0


def run(command: CommandLine, stage: Stage) -> int:
    """Train or evaluate as the command line says.

    Returns:
        The exit status: 0; 1 when a process that the run needs was lost; 2 after a mistake; 130 or 143 after
        SIGINT or SIGTERM.
    """
    status, message = _outcome(command, stage)
    leave_copy(status, message)
    if message:
        complain(f"train_{stage.name}.py: {message}")
    if status and os.environ.get("WORLD_SIZE", "").strip() not in ("", "1"):
        # Leaving the process group in good order would wait for processes that in turn wait for this one.
        os._exit(status)
    return status


def _outcome(command: CommandLine, stage: Stage) -> tuple[int, str]:
    """Return the exit status and, unless it is 0, the line that says why."""
    is_evaluation = "evalmode" in command.typed
    resume = "" if is_evaluation else f"; to resume: {command.to_resume()}"
    try:
        with listening() as requests:
            if is_evaluation:
                _evaluate_only(command, stage)
            else:
                _train_and_evaluate(command, stage, requests)
    except (UserError, OSError) as error:
        return 2, in_words(error)
    except CopyEnded as ended:
        return ended.status, str(ended)
    except Interrupted as interrupted:
        saved = "saved" if interrupted.is_saved else "what was saved before stays"
        return interrupted.exit_status, f"stopped by a signal{interrupted.where}, {saved}{resume}"
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            smaller = "a smaller --batch-size, --accumulate or --checkpoint-activations"
            return 2, f"there is not enough memory; try {smaller}"
        if (lost := _lost_process(error)) is not None:
            return 1, f"{lost}{resume}"
        if is_compiler_error(error):
            return (
                2,
                f"the training step cannot be compiled: {reason_of(error)}; --compile off trains without",
            )
        raise
    return 0, ""


def _lost_process(error: RuntimeError) -> str | None:
    if is_lost_peer(error):
        return f"another process of this run was lost ({str(error).splitlines()[0][:200]})"
    return None


def _train_and_evaluate(command: CommandLine, stage: Stage, requests: Requests) -> None:
    directory = RunDirectory(command.save_directory)
    # One process holds the lock for all that belong to the run.
    with directory.lock() if launch_of_environment().rank == 0 else nullcontext():
        state = _state_to_resume(command, stage, directory)
        origin = None if state else stage.find_origin(command)
        settings = command.settings(
            from_record(state["description"].recipe) if state else None, origin.settings if origin else None
        )
        with shared_out(settings.batch_size, settings.gpu) as processes:
            log = Log(processes.is_main)
            try:
                session = Session(directory, settings, processes, log, requests)
                _train_in_process(command, stage, session, state, origin)
            finally:
                log.close()


def _train_in_process(
    command: CommandLine,
    stage: Stage,
    session: Session,
    state: dict[str, Any] | None,
    origin: Saved | None,
) -> None:
    """Load, train and evaluate in one of the processes that share the run.

    Args:
        command: What was typed.
        stage: What is trained.
        session: The run, its "auto" settings still open.
        state: The checkpoint to resume from, if there is one.
        origin: The network to start from, if there is one.
    """
    directory, log, processes = session.run, session.log, session.processes
    log.line(f"preset {session.settings.preset}, training into {directory.path}")
    if state is not None:
        log.line(f"resuming {directory.last}: {state['epoch']} epochs and {state['step']} steps are done")
        data = _read(session, state["description"].data, state["split"])
        network = _network_to_resume(directory, state)
    else:
        data = _data_to_start(stage, session, origin)
        seed_everything(session.settings.seed, session.settings.deterministic)
        network = stage.make_network(session.settings, data.info, origin)
    operations = _operations(network, data.info.image_size)
    work = data.train.num_images * operations[-1] // processes.world_size
    settings = resolve_auto(session.settings, processes, work * stage.share_of_work(session.settings), work)
    refuse_combinations(network, settings, processes)
    is_required = session.settings.compile != "auto"
    mode = usable_mode(settings.compile, is_required, processes, log.line)
    settings = Namespace(**{**vars(settings), "compile": mode})
    session = replace(session, settings=settings)
    seed_everything(settings.seed, settings.deterministic)  # whatever was drawn for the network
    description = state["description"] if state else _describe(stage, session, data.info, network, origin)
    place(network, session)
    _introduce(network, data, operations, session)
    if processes.is_main and state is None:
        _clear(directory)
    record = recorded(session, str(command), state is not None, description.frozen_digest)
    with record if processes.is_main else nullcontext():
        log.open(directory.tensorboard, state["epoch"] + 1 if state else 0)
        progress = train(stage.make_objective(network, settings), description, data, session, state)
        stage.check_result(network, description)  # of the last epoch, then of the best
        load_weights(network, load_saved(directory.best, {}).network.state_dict())
        stage.check_result(network, description)
        log.line(f"evaluating the best epoch, {progress.best_epoch} of {settings.epochs}: {directory.best}")
        if 0 < data.val.num_images < FEW_IMAGES:
            points = 100 / data.val.num_images
            log.line(
                f"{data.val.num_images} held-out images decide on the best epoch and the thresholds; each is "
                f"worth {points:.1f} "
                "points, so small differences are chance"
            )
        evaluation = Evaluation(session, network, data, description.operations, _curves_of(description))
        evaluation.run(["anytime", "dynamic"] if data.val.num_images else ["anytime"])
        if processes.is_main:
            _to_tensorboard(session, _curves_of(description))
    log.line(f"next: python {stage.next_command} {shlex.quote(str(directory.path))}")


def _evaluate_only(command: CommandLine, stage: Stage) -> None:
    source = command.typed.get("evaluate_from") or RunDirectory(command.save_directory).best
    saved = load_saved(source, command.typed)
    directory = RunDirectory(command.typed.get("save") or saved.path.parent)
    if "save" not in command.typed and saved.path != directory.best:
        raise UserError(f"{source} belongs to no run of this project: say with --save where its tables go")
    if directory.holds_run() and saved.path.resolve() != directory.best.resolve():
        raise UserError(
            f"{directory.path} holds another run than {source}; say with --save where its tables go"
        )
    command.refuse_other_data(saved.settings)
    # As this machine is fastest, unless it is typed; "runtime" measures its policies as they were made.
    settings = command.settings(stored={**saved.settings, "amp": "auto", "compile": "off"})
    if settings.evalmode == "runtime" and settings.amp == "auto":
        dtype = read_policy(directory.policy).dtype
        amp = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "off")
        settings = Namespace(**{**vars(settings), "amp": amp})
    with process_group(settings.gpu) as processes:
        log = Log(processes.is_main)
        settings = resolve_auto(settings, processes)
        seed_everything(settings.seed, settings.deterministic)
        session = Session(directory, settings, processes, log)
        data = _read(session, saved.data, saved.known_split)
        network, operations = saved.network, _operations(saved.network, data.info.image_size)
        if network.num_classes != len(data.info.class_names):
            raise UserError(
                f"{source} has {network.num_classes} classes, the data set {data.info.name} has "
                f"{len(data.info.class_names)}"
            )
        place(network, session)
        _say_class_order(saved, data, log)
        if settings.evalmode == "dynamic" and not saved.data.knows_training_images:
            log.line(
                f"{source} remembers no held-out split: thresholds are set on images it may have seen, and "
                "promise nothing"
            )
        _introduce(network, data, operations, session)
        with directory.lock() if processes.is_main else nullcontext():
            curves, knows_split = _curves_of(saved.description), saved.data.knows_training_images
            Evaluation(session, network, data, operations, curves, knows_split).run([settings.evalmode])


def _state_to_resume(command: CommandLine, stage: Stage, directory: RunDirectory) -> dict[str, Any] | None:
    """Load the checkpoint to resume from, None to start; refuse a directory that holds another run."""
    if not command.typed.get("resume") and not _is_restart(directory):
        if not command.typed.get("overwrite"):
            directory.refuse_second()
        return None
    if not directory.last.exists():
        # The log comes after last.pt, best.safetensors before it: without both the run was killed while it
        # saved for the first time.
        if directory.log.exists():
            raise UserError(
                f"{directory.path} holds a run without last.pt, which --resume needs; --overwrite starts "
                "again"
            )
        if launch_of_environment().rank == 0:
            Log(True).line(f"nothing to resume in {directory.path}: starting from scratch")
        return None
    state = load_checkpoint(directory.last)
    description = state["description"]
    if description.stage != stage.name:
        raise UserError(
            f"{directory.last} was written by train_{description.stage}.py; resume with that program"
        )
    command.refuse_changes({"pretrained": description.origin, **from_record(description.recipe)})
    return state


def _is_restart(directory: RunDirectory) -> bool:
    """Return True if torchrun starts the processes of this run again after one was lost (--max-restarts)."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without --rdzv_id every launch has the same name; with it, each machine counts its own restarts alone,
    # and the name tells.
    may_be = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 or launch not in (None, "none")
    return may_be and directory.last.exists() and load_checkpoint(directory.last).get("launch") == launch


def _network_to_resume(directory: RunDirectory, state: dict[str, Any]) -> ExitNetwork:
    with damage_named(directory.last):
        network = with_weights(state["description"].network, state["state_dict"])
    # The best epoch is needed at the end; that its file is of another run should be known before.
    if state["best_epoch"] and load_saved(directory.best, {}).network.config != network.config:
        raise UserError(f"{directory.best} holds another network than {directory.last}")
    return network


def stage_1_run(command: CommandLine) -> Path:
    """Return the network of stage 1 in the directory GE beside the directory of this run.

    Raises:
        UserError: There is none.
    """
    path = RunDirectory(command.save_directory.parent / "GE").best
    if not path.exists():
        raise UserError(
            f"there is no stage-1 checkpoint {path}: run stage 1 first (train_GE.py), or name one with "
            "--pretrained"
        )
    return find(path)


def _data_to_start(stage: Stage, session: Session, origin: Saved | None) -> Data:
    """Read the images. Those held out from the network to start from stay so: it knows the others."""
    preprocessing = stage.preprocessing(session.settings, origin)
    if origin is None:
        return _read(session, preprocessing=preprocessing)
    if stage.may_change_data:
        data = _read(session, preprocessing=preprocessing)
        is_same = data.info.fingerprint == origin.data.fingerprint
        if not is_same or torch.equal(data.split.held_out, origin.split.held_out):
            return data
    data = _read(session, origin.data, origin.known_split)
    _say_class_order(origin, data, session.log)
    return data


def _read(
    session: Session,
    stored: DataInfo | None = None,
    split: Split | None = None,
    preprocessing: DataInfo | Preprocessing | None = None,
) -> Data:
    settings, processes = session.settings, session.processes
    of = "" if settings.data == "folder" else f" of {settings.data}"
    where = f" in {settings.data_root}" * (settings.data != "demo")
    with session.log.waiting(f"reading the images{of}{where}"):
        return load_data(settings, processes.device, processes.shard, stored, split, preprocessing)


def _operations(network: ExitNetwork, image_size: int) -> list[int]:
    try:
        return count_operations(network, image_size)
    except ValueError as error:
        raise UserError(f"--image-size {image_size}: {error}") from None


def resolve_auto(
    settings: Namespace, processes: Processes, work_on_cpu: float = 0.0, work: float = 0.0
) -> Namespace:
    """Return the settings with --amp auto and --compile auto resolved.

    All processes decide together about --amp: they may run on unlike machines, or measure differently.

    Args:
        settings: The settings of ``args``.
        processes: The processes that share the run.
        work_on_cpu: Forward operations per epoch and process that compiling makes faster on a CPU.
        work: Forward operations per epoch and process.
    """
    amp, compile_mode = settings.amp, settings.compile
    if amp == "auto":
        choices = ("bf16", "fp16", "off")
        own = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[half_precision(processes.device)]
        amp = choices[processes.largest(choices.index(own))]
    if compile_mode == "auto":
        on_gpu = torch.cuda.is_available()
        possible = not settings.checkpoint_activations and (settings.gpu is None or len(settings.gpu) < 2)
        # A small network keeps a GPU waiting for its kernels to start, also where it is frozen.
        is_long = settings.epochs * (work if on_gpu else work_on_cpu) > COMPILING_PAYS
        fitting = "reduce-overhead" if on_gpu and settings.accumulate == 1 else "default"
        compile_mode = fitting if possible and is_long else "off"
    if amp == "bf16" and processes.device.type == "cpu" and settings.evalmode != "runtime":
        # Several threads would wait for each other in every convolution, very long beside another program.
        torch.set_num_threads(1)
    return Namespace(**{**vars(settings), "amp": amp, "compile": compile_mode})


def place(network: ExitNetwork, session: Session) -> None:
    """Move a network to its device, in the memory layout and precision that the settings ask for."""
    settings = session.settings
    set_tf32(settings.tf32)
    network.to(session.processes.device)
    if settings.channels_last:
        set_memory_format(network, torch.channels_last)
    network.checkpoint_activations = settings.checkpoint_activations


def _describe(
    stage: Stage, session: Session, data: DataInfo, network: ExitNetwork, origin: Saved | None
) -> Description:
    settings = session.settings
    return Description(
        network=network_options(network),
        data=data,
        operations=_operations(network, data.image_size),
        stage=stage.name,
        title=stage.title(settings),
        recipe=plain(settings),
        seed=settings.seed,
        commit=commit(),
        origin=str(origin.path.resolve()) if origin else None,
        frozen_digest=stage.frozen_digest(network),
    )


def _curves_of(description: Description) -> dict[str, Any]:
    return {"title": description.title, "origin": description.origin if description.stage == "IMTA" else None}


def _introduce(network: ExitNetwork, data: Data, operations: list[int], session: Session) -> None:
    """Print the data set, the network and how it runs."""
    processes, settings, log = session.processes, session.settings, session.log
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    device = f"GPU {','.join(map(str, processes.gpu_ids))}" if processes.gpu_ids else "CPU"
    number = f"{processes.world_size} processes" if processes.world_size > 1 else "1 process"
    precision = {"off": "float32"}.get(settings.amp, settings.amp)
    for note in data.notes:
        log.line(note)
    parts = {"training": data.train, "held-out": data.val, "test": data.test}
    counts = ", ".join(f"{part.num_images:,} {name}" for name, part in parts.items() if part.num_images)
    size, classes = data.info.image_size, len(data.info.class_names)
    log.line(f"{data.info.name}: {counts} images; {classes} classes, {size} x {size} pixels")
    log.line(f"{network.kind}: {network.num_exits} exits at {millions(*operations)} operations")
    log.line(
        f"{total:,} parameters, {trained:,} of them learn; {device}, {number}, {precision}; into "
        f"{session.run.path}"
    )


def _say_class_order(saved: Saved, data: Data, log: Log) -> None:
    if data.info.class_names != saved.data.class_names:
        names = ", ".join(data.info.class_names[:3])
        log.line(
            f"{saved.path} is a converted checkpoint with other class names: its classes are taken in the "
            "order of the "
            f"folders' names ({names}, ...)"
        )


def _clear(directory: RunDirectory) -> None:
    for path in directory.results:
        path.unlink(missing_ok=True)
    shutil.rmtree(directory.tensorboard, ignore_errors=True)


def _to_tensorboard(session: Session, curves: dict[str, Any]) -> None:
    directory, writer = session.run, session.log.writer
    writer.add_figure("accuracy against operations", draw_curves(known_curves(directory, curves)))
    for path in filter(Path.exists, (directory.budgeted, directory.optimised)):
        for row in read_csv(path, ("operations", "test_acc1")):
            name = f"test_acc1_by_thousand_operations/{path.stem}"
            writer.add_scalar(name, row["test_acc1"], int(row["operations"]) // 1000)
    options = {
        name: x if isinstance(x, (int, float)) else one_line(str(x))
        for name, x in plain(session.settings).items()
    }
    accuracies = {f"test_acc1/exit_{row['exit']:.0f}": row["acc1"] for row in read_csv(directory.anytime)}
    writer.add_hparams(options, accuracies, run_name=".")
