"""A run from its command line to its tables: check, load, train or resume, evaluate.

Example:
    status = run(parse("GE", argv), Stage1())
"""

import gc
import os
import shlex
import shutil
import sys
import time
from argparse import Namespace
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from adaptive_inference import read_policy
from dataloader import Data
from engine.auto import compiling_conflict, resolve_auto, with_values
from engine.checkpoint import LoadedNetwork, load_saved, save_network
from engine.evaluate import Evaluation
from engine.networks import expected_images
from engine.report import draw_curves, known_curves, millions, read_csv
from engine.resuming import checkpoint_to_resume, network_to_resume
from engine.run_data import (
    data_for_new_run,
    held_out_are_new,
    load_run_data,
    log_class_order,
    split_is_complete,
)
from engine.run_directory import RunDirectory
from engine.runtime.compiling import usable_mode
from engine.runtime.device import prepare_network_and_device, seed_everything
from engine.runtime.distributed import Processes, process_group, torchrun_environment
from engine.runtime.failures import status_and_line
from engine.runtime.launch import exit_worker, training_processes, workers_end_inside
from engine.runtime.log import Log
from engine.runtime.precision import amp_of
from engine.runtime.signals import Interrupted, SignalRequests, handle_signals
from engine.session import Session, git_commit, recorded_in_run_json, to_plain_types
from engine.stage import Stage
from engine.trainer import Trainer, train
from image_data.reading import ignore_pillow_warnings
from models import Description, ExitNetwork, count_operations
from models.network import to_config
from models.saved import load_weights
from settings.command_line import CommandLine, recipe_of, settings_from_recipe
from settings.conflicts import conflict_on_machine
from utils import UserError, one_line, print_error

MAX_STEPS = 2**40  # of an epoch
SECONDS_TO_APPEAR = 60  # on another machine, of a file in a network file system
# Settings that a resumption may change and later evaluations read.
READ_BY_EVALUATIONS = ("data_root", "measure", "skip_unreadable")
FEW_HELD_OUT_IMAGES = 200  # with fewer, the best epoch is largely a matter of chance


def run(command: CommandLine, stage: Stage) -> int:
    """Train or evaluate as the command line says.

    Returns:
        The exit status: 0, or that of ``engine.runtime.failures.status_and_line``.
    """
    ignore_pillow_warnings()
    status, message, requests = 0, "", SignalRequests()
    with workers_end_inside():
        try:
            with handle_signals() as requests:
                if "evalmode" in command.typed:
                    _evaluate_only(command, stage)
                else:
                    _train_and_evaluate(command, stage, requests)
        except (Exception, Interrupted) as error:
            status, message = status_and_line(requests.reason(error), command)
        exit_worker(status, message)
    if message:
        print_error(f"train_{stage.name}.py: {message}")
    return status


def end_program(status: int) -> NoReturn:
    """End the program with the exit status that ``run`` returned.

    After an error, a process of torchrun ends at once: leaving the process group in good order would wait for
    processes that in turn wait for this one.
    """
    if status and os.environ.get("WORLD_SIZE", "").strip() not in ("", "1"):
        os._exit(status)
    sys.exit(status)


def _train_and_evaluate(command: CommandLine, stage: Stage, requests: SignalRequests) -> None:
    directory = RunDirectory(command.save_directory)
    # One process holds the lock for all that belong to the run.
    with directory.lock() if torchrun_environment().rank == 0 else nullcontext():
        checkpoint = checkpoint_to_resume(command, stage.name, directory)
        origin = None if checkpoint else stage.find_origin(command)
        if origin is not None and origin.path.resolve() == directory.best.resolve():
            raise UserError(
                f"--save {directory.path} is the run of --pretrained, whose network would be replaced; "
                "name another directory"
            )
        settings = command.settings(
            recipe=settings_from_recipe(checkpoint["description"].recipe) if checkpoint else None,
            origin_recipe=recipe_of(origin.network) if origin else None,
        )
        with (
            training_processes(settings.batch_size, settings.gpu, requests, settings.accumulate) as processes,
            closing(Log(processes.is_main)) as log,
        ):
            # A resumed run also has a mode where none was requested: what "auto" chose when it began.
            may_train_eagerly = command.typed.get("compile", "auto") == "auto"
            session = Session(directory, settings, processes, log, requests, may_train_eagerly)
            _train_in_process(command, stage, session, checkpoint, origin)


def _train_in_process(
    command: CommandLine,
    stage: Stage,
    session: Session,
    checkpoint: dict[str, Any] | None,
    origin: LoadedNetwork | None,
) -> None:
    """Load, train and evaluate in one of the processes that share the run.

    Args:
        command: The command line.
        stage: The stage to train.
        session: The run, its "auto" settings still open.
        checkpoint: The checkpoint to resume from, None to start.
        origin: The network to start from, None to start from scratch or to resume.
    """
    directory, log, is_main = session.directory, session.log, session.processes.is_main
    _check_one_state(session.processes, checkpoint)
    _check_one_folder(session.processes, directory)
    log.line(f"preset {session.settings.preset}, training into {directory.path}")
    session, data, network, description = _prepare(stage, session, checkpoint, origin)
    # Both may raise: make them before the old run is deleted.
    objective = stage.make_objective(network, session.settings)
    trainer = Trainer(objective, description, data, session)
    _log_setup(network, data, description.operations, session)
    if is_main and checkpoint is None:
        _delete_old_run(directory)
    record = recorded_in_run_json(session, str(command), checkpoint is not None, description.frozen_digest)
    with record if is_main else nullcontext():
        log.open(directory.tensorboard, checkpoint["epoch"] + 1 if checkpoint else 0)
        progress = train(trainer, checkpoint)
        del trainer  # the evaluation needs no optimizer and no moving average
        gc.collect()  # the trainer and its interruptions refer to each other
        stage.check_result(network, description)  # the last epoch
        best = load_saved(directory.best)
        load_weights(network, best.network.state_dict())
        if is_main:
            _update_recipe(best, description)
        stage.check_result(network, description)  # the best epoch
        epochs = session.settings.epochs
        log.line(f"evaluating the best epoch, {progress.best_epoch} of {epochs}: {directory.best}")
        _evaluate(session, network, data, description, _runs_to_draw(stage, description, directory))
    log.line(f"next: python {stage.next_command} {shlex.quote(str(directory.path))}")


def _update_recipe(best: LoadedNetwork, description: Description) -> None:
    """Write what a resumption has changed in the recipe into the file of the best epoch, if it is older."""
    recipe = {**best.description.recipe, **{name: description.recipe[name] for name in READ_BY_EVALUATIONS}}
    if recipe != best.description.recipe:
        save_network(best.path, best.network, replace(best.description, recipe=recipe), best.split)


def _check_one_state(processes: Processes, checkpoint: dict[str, Any] | None) -> None:
    """Raise UserError if the processes have read different checkpoints: their folders are not one."""
    steps = -1 if checkpoint is None else checkpoint["epoch"] * MAX_STEPS + checkpoint["step"]
    if not processes.all_equal(steps):
        raise UserError(
            "the processes of this run find different checkpoints: --save must be a folder that all machines "
            "share"
        )


def _check_one_folder(processes: Processes, directory: RunDirectory) -> None:
    """Raise UserError if a process does not see the lock that the main process has made."""
    last = time.monotonic() + SECONDS_TO_APPEAR
    while not directory.lock_file.exists() and time.monotonic() < last:
        time.sleep(0.5)
    if processes.all_reduce_max(not directory.lock_file.exists()):
        raise UserError(
            f"not all processes of this run see {directory.lock_file}: --save must be a folder that all "
            "machines share"
        )


def _prepare(
    stage: Stage, session: Session, checkpoint: dict[str, Any] | None, origin: LoadedNetwork | None
) -> tuple[Session, Data, ExitNetwork, Description]:
    """Read the images, make the network and its description, and resolve the "auto" settings by them.

    Returns:
        The session with its settings resolved, the images, the network on its device, and its description.
    """
    if checkpoint is None:
        data, network = _start(stage, session, origin)
    else:
        data, network = _resume(session, checkpoint)
    operations = _operations_to_exits(network, data.info.image_size)
    session = _resolve_auto(stage, session, network, data, operations[-1])
    settings = session.settings
    # Again: building a network draws a number of values that depends on its kind.
    seed_everything(settings.seed, settings.deterministic)
    if checkpoint is None:
        description = _describe(stage, session, data, network, operations, origin)
    else:
        description = checkpoint["description"]
        changed = {name: to_plain_types(settings)[name] for name in READ_BY_EVALUATIONS}
        description = replace(description, recipe={**description.recipe, **changed})
    _prepare_device(session, network, operations[-1])
    return session, data, network, description


def _prepare_device(session: Session, network: ExitNetwork, operations: int) -> None:
    """Prepare the device for steps of a network with ``operations`` per image, and move the network to it."""
    settings, processes = session.settings, session.processes
    operations_per_step = operations * settings.batch_size // processes.world_size
    prepare_network_and_device(network, settings, processes.device, operations_per_step)


def _start(stage: Stage, session: Session, origin: LoadedNetwork | None) -> tuple[Data, ExitNetwork]:
    """Read the images of a new run, and build its network."""
    settings = session.settings
    may_change_data = not stage.spec.inherits_data
    data = data_for_new_run(session, origin, expected_images(settings, origin), may_change_data)
    seed_everything(settings.seed, settings.deterministic)
    return data, stage.make_network(settings, data.info, origin)


def _resume(session: Session, checkpoint: dict[str, Any]) -> tuple[Data, ExitNetwork]:
    """Read the images of the run to resume, and load its network."""
    last, epochs, steps = session.directory.last, checkpoint["epoch"], checkpoint["step"]
    session.log.line(f"resuming {last}: {epochs} epochs and {steps} steps are done")
    data = load_run_data(session, checkpoint["description"].data, checkpoint["split"])
    return data, network_to_resume(session.directory, checkpoint)


def _resolve_auto(
    stage: Stage, session: Session, network: ExitNetwork, data: Data, operations: int
) -> Session:
    """Return the session with its "auto" settings resolved, in a combination that works here.

    Args:
        stage: The stage to train.
        session: The run.
        network: The network to train.
        data: The images.
        operations: Operations of the network per image.

    Raises:
        UserError: The settings cannot be combined, or compiling was requested and fails.
    """
    asked, processes = session.settings, session.processes
    settings = resolve_auto(
        asked,
        processes,
        network,
        data.info.image_size,
        operations,
        operations_per_process=data.train.num_images * operations // processes.world_size,
        compile_speedup_share=stage.compile_speedup_share(asked),
    )
    # --compile auto of a run that resumes was resolved where the run began, perhaps for other GPUs.
    if session.may_train_eagerly and (conflict := compiling_conflict(settings.compile, settings, processes)):
        session.log.line(f"training is not compiled: {conflict}")
        settings = with_values(settings, compile="off")
    has_batch_norm_1d = any(isinstance(layer, nn.BatchNorm1d) for layer in network.modules())
    if conflict := conflict_on_machine(
        settings, processes.world_size, len(processes.gpu_ids), has_batch_norm_1d
    ):
        raise UserError(conflict)
    mode = usable_mode(settings.compile, not session.may_train_eagerly, processes, session.log.line)
    return replace(session, settings=with_values(settings, compile=mode))


def _evaluate(
    session: Session,
    network: ExitNetwork,
    data: Data,
    description: Description,
    runs_to_draw: dict[str, RunDirectory],
) -> None:
    """Evaluate a trained network, and show the results in TensorBoard too."""
    held_out = data.val.num_images
    if 0 < held_out < FEW_HELD_OUT_IMAGES:
        session.log.line(
            f"{held_out} held-out images decide on the best epoch and the thresholds; "
            f"each is worth {100 / held_out:.1f} points, so small differences are chance"
        )
    evaluation = Evaluation(
        session, network, data, description.operations, runs_to_draw, description.held_out_are_new
    )
    evaluation.run(["anytime", "dynamic"] if held_out else ["anytime"])
    if session.processes.is_main:
        _to_tensorboard(session, runs_to_draw)


def _network_to_evaluate(command: CommandLine) -> tuple[LoadedNetwork, RunDirectory]:
    """Load the network that the command line names, and return it and the directory of its tables.

    Raises:
        UserError: There is none, or the tables of another network or image size would be replaced.
    """
    source = command.typed.get("evaluate_from") or RunDirectory(command.save_directory).best
    saved = load_saved(source)
    directory = RunDirectory(command.typed.get("save") or saved.path.parent)
    if "save" not in command.typed and saved.path != directory.best:
        raise UserError(f"{source} does not belong to a run of this project; pass --save DIR for its tables")
    if directory.holds_run() and saved.path.resolve() != directory.best.resolve():
        raise UserError(f"{directory.path} holds another run than {source}; pass --save DIR for its tables")
    command.refuse_other_network(saved.path, saved.network)
    size = command.typed.get("image_size")
    if size not in (None, saved.data.image_size) and saved.path.resolve() == directory.best.resolve():
        raise UserError(
            f"the tables and policies in {directory.path} are for images of {saved.data.image_size} pixels; "
            f"pass --save DIR for those of {size}"
        )
    return saved, directory


def _settings_to_evaluate(command: CommandLine, saved: LoadedNetwork, directory: RunDirectory) -> Namespace:
    """Return the settings of an evaluation: --amp is chosen for this machine unless the user typed it.

    Runtime evaluation uses the dtype of the policy file.

    Raises:
        UserError: The command line changes what belongs to the network or its policies.
    """
    recipe = recipe_of(saved.network)
    command.refuse_changes(recipe, saved.description.origin)
    settings = command.settings(recipe={**recipe, "amp": "auto", "compile": "off"})
    if settings.evalmode != "runtime":
        return settings
    curve = read_policy(directory.policy)
    measure = curve.points[0].policy.measure
    if "measure" in command.typed and settings.measure != measure:
        raise UserError(
            f"the policies in {directory.policy} decide by {measure}; "
            f"--evalmode dynamic --measure {settings.measure} makes others"
        )
    if settings.amp == "auto":
        settings = with_values(settings, amp=amp_of(getattr(torch, curve.dtype, None)))
    return settings


def _description_for(data: Data, saved: LoadedNetwork) -> Description:
    """Return the description of a network to evaluate, with the image size and the operations of ``data``.

    Raises:
        UserError: The network has other classes, or cannot take images of this size.
    """
    description = saved.description
    if data.info.image_size != saved.data.image_size:
        operations = _operations_to_exits(saved.network, data.info.image_size)
        spec = data.info.image_spec
        own_data = replace(saved.data, image_size=spec.image_size, crop_share=spec.crop_share)
        description = replace(description, operations=operations, data=own_data)
    if saved.network.num_classes != len(data.info.class_names):
        raise UserError(
            f"{saved.path} has {saved.network.num_classes} classes, "
            f"the data set {data.info.name} has {len(data.info.class_names)}"
        )
    return description


def _evaluate_only(command: CommandLine, stage: Stage) -> None:
    saved, directory = _network_to_evaluate(command)
    settings = _settings_to_evaluate(command, saved, directory)
    with process_group(settings.gpu) as processes, closing(Log(processes.is_main)) as log:
        image_spec = expected_images(settings, saved)
        session = Session(directory, settings, processes, log)
        data = load_run_data(session, saved.data, saved.known_split, image_spec)
        network, description = saved.network, _description_for(data, saved)
        network.description = description
        settings = resolve_auto(
            settings, processes, network, data.info.image_size, description.operations[-1]
        )
        session = replace(session, settings=settings)
        seed_everything(settings.seed, settings.deterministic)
        if settings.evalmode == "runtime":
            # cuDNN would try its algorithms for every number of images, within the measured time.
            torch.backends.cudnn.benchmark = False
        _prepare_device(session, network, description.operations[-1])
        log_class_order(saved, data, log)
        _log_setup(network, data, description.operations, session)
        with directory.lock() if processes.is_main else nullcontext():
            runs_to_draw = _runs_to_draw(stage, description, directory)
            are_new = saved.data.knows_training_images and description.held_out_are_new
            evaluation = Evaluation(session, network, data, description.operations, runs_to_draw, are_new)
            if settings.evalmode == "runtime":
                evaluation.runtime()
            else:
                evaluation.run([settings.evalmode])


def _operations_to_exits(network: ExitNetwork, image_size: int) -> list[int]:
    try:
        return count_operations(network, image_size)
    except ValueError as error:
        raise UserError(f"--image-size {image_size}: {error}") from None


def _describe(
    stage: Stage,
    session: Session,
    data: Data,
    network: ExitNetwork,
    operations: list[int],
    origin: LoadedNetwork | None,
) -> Description:
    settings = session.settings
    return Description(
        network=to_config(network),
        data=data.info,
        operations=operations,
        stage=stage.name,
        title=stage.title(network, settings),
        recipe=to_plain_types(settings),
        seed=settings.seed,
        commit=git_commit(),
        origin=str(origin.path.resolve()) if origin else None,
        frozen_digest=stage.frozen_digest(network),
        held_out_are_new=held_out_are_new(settings, origin, data, network),
        split_is_complete=split_is_complete(origin, data),
    )


def _runs_to_draw(stage: Stage, description: Description, run: RunDirectory) -> dict[str, RunDirectory]:
    """Return the runs whose curves are drawn, by title: this one, after the one it started from."""
    if stage.origin_title is None or description.origin is None:
        return {description.title: run}
    return {stage.origin_title: RunDirectory(Path(description.origin).parent), description.title: run}


def _log_setup(network: ExitNetwork, data: Data, operations: list[int], session: Session) -> None:
    """Print the data set, the network and how it runs."""
    processes, settings, log = session.processes, session.settings, session.log
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    device = f"GPU {','.join(map(str, processes.gpu_ids))}" if processes.gpu_ids else "CPU"
    number = f"{processes.world_size} processes" if processes.world_size > 1 else "1 process"
    precision = "float32" if settings.amp == "off" else settings.amp
    for note in data.notes:
        log.line(note)
    parts = {"training": data.train, "held-out": data.val, "test": data.test}
    counts = ", ".join(f"{part.num_images:,} {name}" for name, part in parts.items() if part.num_images)
    size, classes = data.info.image_size, len(data.info.class_names)
    log.line(f"{data.info.name}: {counts} images; {classes} classes, {size} x {size} pixels")
    log.line(f"{network.title}: {network.num_exits} exits at {millions(*operations)} operations")
    pretrained = {id(p) for p in network.pretrained_parameters()} if settings.pretrained else set()
    if any(id(p) in pretrained for _, p in network.classifier_parameters()):
        log.line(f"the last linear layer comes with the weights too, as it has {classes} outputs")
    log.line(
        f"{total:,} parameters, {trained:,} of them trainable; "
        f"{device}, {number}, {precision}; into {session.directory.path}"
    )


def _delete_old_run(directory: RunDirectory) -> None:
    if directory.run_json.exists() or directory.log_file.exists():  # else the folder is another program's
        shutil.rmtree(directory.tensorboard, ignore_errors=True)
    for path in directory.files:
        path.unlink(missing_ok=True)


def _to_tensorboard(session: Session, runs_to_draw: dict[str, RunDirectory]) -> None:
    directory, writer = session.directory, session.log.writer
    writer.add_figure("accuracy against operations", draw_curves(known_curves(runs_to_draw)))
    for path in filter(Path.exists, (directory.budgeted, directory.optimised)):
        for row in read_csv(path, ("operations", "test_acc1")):
            name = f"test_acc1_by_thousand_operations/{path.stem}"
            writer.add_scalar(name, row["test_acc1"], int(row["operations"]) // 1000)
    options = {
        name: value if isinstance(value, (int, float)) else one_line(str(value))
        for name, value in to_plain_types(session.settings).items()
    }
    accuracies = {f"test_acc1/exit_{row['exit']:.0f}": row["acc1"] for row in read_csv(directory.anytime)}
    writer.add_hparams(options, accuracies, run_name=".")
