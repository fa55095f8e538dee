"""A stage from its command line to its tables: check, load, train or go on, evaluate."""

import os
import shlex
import shutil
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptive_inference import read_policy
from args import CommandLine, parse
from dataloader import Data, load_data
from engine.checkpoint import Saved, damage_named, load_checkpoint, load_saved, settings_of
from engine.device import is_out_of_memory, seed_everything, set_tf32
from engine.distributed import Processes, is_lost_peer, process_group
from engine.evaluate import Evaluation, known_curves
from engine.launch import CopyEnded, leave_copy, shared_out
from engine.log import Log
from engine.precision import half_precision
from engine.provenance import commit, recorded
from engine.report import draw_curves, millions, read_csv
from engine.run_directory import RunDirectory
from engine.session import Session
from engine.signals import Interrupted, Requests, listening
from engine.stepper import refuse_combinations
from engine.training import train
from models import Description, count_operations
from models.saved import DataInfo, Split, build_network, load_weights, network_options
from settings import Settings, plain
from utils import UserError, complain, in_words, one_line

# Operations forwards, of all images of all epochs and in one process, that take eager training about as long as compiling gains.
COMPILING_PAYS = 5e12


class Stage(ABC):
    """What distinguishes a stage.

    ``name`` is that of ``args`` and of directories; ``may_change_data`` says whether it may train on other data than the network it starts
    from; ``next_command`` does something with a run's directory, which it ends with.
    """

    name: str
    may_change_data = False
    next_command: str

    def find_origin(self, command: CommandLine) -> Saved | None:
        """The checkpoint to start from, None to start from scratch.

        Raises:
            UserError, OSError: it is not there, cannot be read, or is of another network than the flags say.
        """
        path = command.origin()
        return None if path is None else load_saved(path, command.explicit)

    @abstractmethod
    def make_network(self, settings: Settings, data: DataInfo, origin: Saved | None) -> nn.Module:
        """The network to train."""

    @abstractmethod
    def make_objective(self, network: nn.Module, settings: Settings) -> nn.Module:
        """A module (images, targets) -> (losses (N,), logits (N, K, C)) with the ``network``. Too late to refuse anything: with
        --overwrite the old run is gone."""

    @abstractmethod
    def title(self, settings: Settings) -> str:
        """Name of a run's curves."""

    def frozen_digest(self, network: nn.Module) -> str | None:
        """Fingerprint of what must not change, None if everything may."""
        return None

    def check_result(self, network: nn.Module, description: Description) -> None:
        """Compare what is frozen with what it was.

        Raises:
            UserError: it moved.
        """
        if self.frozen_digest(network) != description.frozen_digest:
            raise UserError(
                "the frozen stage-1 network changed during stage 2; its classifiers do not belong to it any more"
            )

    def share_of_work(self, settings: Settings) -> float:
        """Operations that compiling makes faster on a CPU, compared with those of training the whole network."""
        return 1.0


def run_stage(stage: Stage, argv: list[str] | None) -> int:
    """Do what the command line says.

    Returns:
        The exit status: 0; 1 when a process the run needs was lost; 2 after a mistake; 130 or 143 after SIGINT or SIGTERM.
    """
    command = parse(stage.name, argv)
    status, message = _outcome_of(stage, command)
    leave_copy(status, message)
    if message:
        complain(f"train_{stage.name}.py: {message}")
    if status and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Leaving the process group in good order would wait for processes that in turn wait for this one.
        os._exit(status)
    return status


def _outcome_of(stage: Stage, command: CommandLine) -> tuple[int, str]:
    """The exit status and, unless it is 0, the line that says why."""
    is_evaluation = "evalmode" in command.explicit
    go_on = "" if is_evaluation else "; go on with --resume"
    try:
        with listening() as requests:
            if is_evaluation:
                _evaluate_only(stage, command)
            else:
                _train_and_evaluate(stage, command, requests)
    except (UserError, OSError) as error:
        return 2, in_words(error)
    except CopyEnded as ended:
        return ended.status, str(ended)
    except Interrupted as interrupted:
        saved = "saved" if interrupted.is_saved else "what was saved before stays"
        return interrupted.exit_status, f"stopped by a signal{interrupted.where}, {saved}{go_on}"
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return (
                2,
                "there is not enough memory; try a smaller --batch-size, --accumulate or --checkpoint-activations",
            )
        if (lost := _lost_process(error)) is not None:
            return 1, f"{lost}{go_on}"
        raise
    return 0, ""


def _lost_process(error: RuntimeError) -> str | None:
    if is_lost_peer(error):
        return f"another process of this run was lost ({str(error).splitlines()[0][:200]})"
    return None


def _train_and_evaluate(stage: Stage, command: CommandLine, requests: Requests) -> None:
    run = RunDirectory(command.save_directory)
    # One process holds the lock for all that belong to the run.
    with run.lock() if int(os.environ.get("RANK", "0")) == 0 else nullcontext():
        state = _state_to_resume(stage, command, run)
        origin = None if state else stage.find_origin(command)
        settings = command.settings(
            settings_of(state["description"]) if state else None, origin.settings if origin else None
        )
        with shared_out(settings.batch_size, settings.gpu) as processes:
            log = Log(processes.is_main)
            try:
                settings = with_precision(settings, processes)
                _keep_threads_from_waiting(settings, processes)
                _Run(
                    stage, command, Session(run, settings, processes, log, requests), state, origin
                ).complete()
            finally:
                log.close()


class _Run:
    """Training and the evaluation after it, in one of the processes that share them: from the ``state`` the run goes on from, or the
    ``origin`` whose network it starts from, or neither."""

    def __init__(
        self,
        stage: Stage,
        command: CommandLine,
        session: Session,
        state: dict[str, Any] | None,
        origin: Saved | None,
    ):
        self.stage, self.command, self.session, self.state, self.origin = (
            stage,
            command,
            session,
            state,
            origin,
        )

    def complete(self) -> None:
        """Load, train and evaluate."""
        session, stage, state = self.session, self.stage, self.state
        if state is not None:
            session.log.line(
                f"going on with {session.run.last}: {state['epoch']} epochs and {state['step']} steps are done"
            )
        data, network = self._load()
        operations = _operations(network, data.info.image_size)
        settings = with_compilation(
            session.settings, stage, data.train.num_images * operations[-1] // session.processes.world_size
        )
        self.session = session = replace(session, settings=settings)
        refuse_combinations(network, settings, session.processes)
        description = state["description"] if state else self._description(data.info, network, operations)
        place(network, session)
        _introduce(network, data, operations, session)
        is_main = session.processes.is_main
        if is_main and state is None:
            _clear(session.run)
        with (
            recorded(session, str(self.command), state is not None, description.frozen_digest)
            if is_main
            else nullcontext()
        ):
            session.log.open(session.run, state["epoch"] + 1 if state else 0)
            self._train_and_evaluate(network, data, description)
            if is_main:
                _to_tensorboard(session, _curves_of(description))
        session.log.line(f"next: python {stage.next_command} {shlex.quote(str(session.run.path))}")

    def _load(self) -> tuple[Data, nn.Module]:
        settings, state = self.session.settings, self.state
        if state is not None:
            data = _read(self.session, state["description"].data, state["split"])
            network = _network_to_resume(self.session.run, state)
        else:
            data = self._data_to_start()
            if self.origin and not self.origin.data.knows_training_images:
                _say_class_order(self.origin, data, self.session.log)
            seed_everything(settings.seed, settings.deterministic)
            network = self.stage.make_network(settings, data.info, self.origin)
        seed_everything(settings.seed, settings.deterministic)  # whatever was drawn for the network
        return data, network

    def _data_to_start(self) -> Data:
        """Images that were held out from the network a run starts from stay so: it would know the others already."""
        origin = self.origin
        if origin is None:
            return _read(self.session)
        if self.stage.may_change_data:
            data = _read(self.session)
            if data.info.fingerprint != origin.data.fingerprint or torch.equal(
                data.split.held_out, origin.split.held_out
            ):
                return data
        return _read(self.session, origin.data, origin.known_split)

    def _description(self, data: DataInfo, network: nn.Module, operations: list[int]) -> Description:
        settings = self.session.settings
        return Description(
            network=network_options(network),
            data=data,
            operations=operations,
            stage=self.stage.name,
            title=self.stage.title(settings),
            recipe=plain(settings),
            seed=settings.seed,
            commit=commit(),
            origin=str(self.origin.path.resolve()) if self.origin else None,
            frozen_digest=self.stage.frozen_digest(network),
        )

    def _train_and_evaluate(self, network: nn.Module, data: Data, description: Description) -> None:
        session, stage = self.session, self.stage
        progress = train(
            stage.make_objective(network, session.settings), description, data, session, self.state
        )
        stage.check_result(network, description)  # of the last epoch, then of the best
        load_weights(network, load_saved(session.run.best, {}).network.state_dict())
        stage.check_result(network, description)
        session.log.line(
            f"evaluating the best epoch, {progress.best_epoch} of {session.settings.epochs}: {session.run.best}"
        )
        evaluation = Evaluation(session, network, data, description.operations, _curves_of(description))
        evaluation.run(["anytime", "dynamic"] if data.val.num_images else ["anytime"])


def _is_restart(run: RunDirectory) -> bool:
    """Whether torchrun starts all processes again after one was lost (--max-restarts), and the run here is the one they began."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without --rdzv_id every launch has the same name; with it, each machine counts its own restarts alone, and the name tells.
    may_be = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 or launch not in (None, "none")
    return may_be and run.last.exists() and load_checkpoint(run.last).get("launch") == launch


def _state_to_resume(stage: Stage, command: CommandLine, run: RunDirectory) -> dict[str, Any] | None:
    if not command.explicit.get("resume") and not _is_restart(run):
        if not command.explicit.get("overwrite"):
            run.refuse_second()
        return None
    if not run.last.exists():
        # The log comes after last.pt, best.safetensors before it: without both the run was killed while it saved for the first time.
        if run.log.exists():
            raise UserError(
                f"{run.path} holds a run without last.pt, which --resume needs; --overwrite starts anew"
            )
        if int(os.environ.get("RANK", "0")) == 0:
            Log(True).line(f"nothing to resume in {run.path}: starting from scratch")
        return None
    state = load_checkpoint(run.last)
    description = state["description"]
    if description.stage != stage.name:
        raise UserError(f"{run.last} was written by train_{description.stage}.py; go on with that program")
    command.refuse_changes({"pretrained": description.origin, **settings_of(description)})
    return state


def _network_to_resume(run: RunDirectory, state: dict[str, Any]) -> nn.Module:
    with damage_named(run.last):
        network = build_network(state["description"].network)
        load_weights(network, state["state_dict"])
    # The best epoch is needed at the end; that its file is of another run should be known before.
    if state["best_epoch"] and load_saved(run.best, {}).network.config != network.config:
        raise UserError(f"{run.best} holds another network than {run.last}")
    return network


def _curves_of(description: Description) -> dict[str, Any]:
    return {"title": description.title, "origin": description.origin if description.stage == "IMTA" else None}


def _operations(network: nn.Module, image_size: int) -> list[int]:
    try:
        return count_operations(network, image_size)
    except ValueError as error:
        raise UserError(f"--image-size {image_size}: {error}") from None


def with_precision(settings: Settings, processes: Processes) -> Settings:
    """``--amp auto`` decided, by all processes together: they may run on unlike machines, or measure differently."""
    if settings.amp != "auto":
        return settings
    choices = ("bf16", "fp16", "off")
    own = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[half_precision(processes.device)]
    return replace(settings, amp=choices[processes.largest(choices.index(own))])


def _keep_threads_from_waiting(settings: Settings, processes: Processes) -> None:
    """Several threads would wait for each other in every convolution, very long beside another program."""
    if settings.amp == "bf16" and processes.device.type == "cpu":
        torch.set_num_threads(1)


def with_compilation(settings: Settings, stage: Stage, operations_an_epoch: float) -> Settings:
    """``--compile auto`` decided: whether a training of so many operations an epoch, in each process, is long enough to pay for it."""
    if settings.compile != "auto":
        return settings
    possible = not settings.checkpoint_activations and (settings.gpu is None or len(settings.gpu) < 2)
    on_gpu = torch.cuda.is_available()
    # A small network keeps a GPU waiting for its kernels to start, also where it is frozen.
    is_long = (
        settings.epochs * operations_an_epoch * (1.0 if on_gpu else stage.share_of_work(settings))
        > COMPILING_PAYS
    )
    fitting = "reduce-overhead" if on_gpu and settings.accumulate == 1 else "default"
    return replace(settings, compile=fitting if possible and is_long else "off")


def place(network: nn.Module, session: Session) -> None:
    """Move a network to its device, in the memory layout and precision that the settings ask for."""
    settings = session.settings
    set_tf32(settings.tf32)
    network.to(
        session.processes.device,
        memory_format=torch.channels_last if settings.channels_last else torch.preserve_format,
    )
    network.checkpoint_activations = settings.checkpoint_activations


def _read(session: Session, stored: DataInfo | None = None, split: Split | None = None) -> Data:
    settings, processes = session.settings, session.processes
    of = "" if settings.data == "folder" else f" of {settings.data}"
    with session.log.waiting(
        f"reading the images{of}" + f" in {settings.data_root}" * (settings.data != "demo")
    ):
        return load_data(settings, processes.device, processes.shard, stored, split)


def _introduce(network: nn.Module, data: Data, operations: list[int], session: Session) -> None:
    processes, settings = session.processes, session.settings
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    device = f"GPU {','.join(map(str, processes.gpu_ids))}" if processes.gpu_ids else "CPU"
    number = f"{processes.world_size} processes" if processes.world_size > 1 else "1 process"
    precision = {"off": "float32"}.get(settings.amp, settings.amp)
    for note in data.notes:
        session.log.line(note)
    parts = {"training": data.train, "held-out": data.val, "test": data.test}
    counts = ", ".join(f"{part.num_images:,} {name}" for name, part in parts.items() if part.num_images)
    session.log.line(f"{data.info.name}: {counts} images")
    session.log.line(f"{network.kind}: {network.num_exits} exits at {millions(*operations)} operations")
    session.log.line(
        f"{total:,} parameters, {trained:,} of them learn; {device}, {number}, {precision}; into {session.run.path}"
    )


def _say_class_order(saved: Saved, data: Data, log: Log) -> None:
    if data.info.class_names != saved.data.class_names:
        names = ", ".join(data.info.class_names[:3])
        log.line(
            f"{saved.path} is a converted checkpoint with other class names: its classes are taken in the order of the "
            f"folders' names ({names}, ...)"
        )


def _clear(run: RunDirectory) -> None:
    for path in run.results:
        path.unlink(missing_ok=True)
    shutil.rmtree(run.tensorboard, ignore_errors=True)


def _evaluate_only(stage: Stage, command: CommandLine) -> None:
    source = command.explicit.get("evaluate_from") or RunDirectory(command.save_directory).best
    saved = load_saved(source, command.explicit)
    run = RunDirectory(command.explicit.get("save") or saved.path.parent)
    if "save" not in command.explicit and saved.path != run.best:
        raise UserError(f"{source} is of no run of this project: say with --save where its tables go")
    if run.holds_run() and saved.path.resolve() != run.best.resolve():
        raise UserError(f"{run.path} holds another run than {source}; say with --save where its tables go")
    settings = command.settings(stored=saved.settings)
    amp = command.explicit.get("amp", Settings.amp)
    if settings.evalmode == "runtime" and amp == "auto":  # as its policies were made
        amp = {"bfloat16": "bf16", "float16": "fp16"}.get(read_policy(run.policy).dtype, "off")
    with process_group(settings.gpu) as processes:
        log = Log(processes.is_main)
        settings = with_precision(replace(settings, amp=amp), processes)
        if settings.evalmode != "runtime":  # which measures what predict.py does
            _keep_threads_from_waiting(settings, processes)
        seed_everything(settings.seed, settings.deterministic)
        session = Session(run, settings, processes, log)
        data = _read(session, saved.data, saved.known_split)
        network, operations = saved.network, _operations(saved.network, data.info.image_size)
        if network.num_classes != len(data.info.class_names):
            raise UserError(
                f"{source} has {network.num_classes} classes, the data set {data.info.name} has {len(data.info.class_names)}"
            )
        place(network, session)
        if not saved.data.knows_training_images:
            _say_class_order(saved, data, log)
            if settings.evalmode == "dynamic":
                log.line(
                    f"{source} remembers no held-out split: thresholds are set on images it may have seen, and promise nothing"
                )
        _introduce(network, data, operations, session)
        with run.lock() if processes.is_main else nullcontext():
            curves, knows_split = _curves_of(saved.description), saved.data.knows_training_images
            Evaluation(session, network, data, operations, curves, knows_split).run([settings.evalmode])


def _to_tensorboard(session: Session, curves: dict[str, Any]) -> None:
    run, writer = session.run, session.log.writer
    writer.add_figure("accuracy against operations", draw_curves(known_curves(run, curves)))
    for path in filter(Path.exists, (run.budgeted, run.optimised)):
        for row in read_csv(path, ("operations", "test_acc1")):
            writer.add_scalar(
                f"test_acc1_by_thousand_operations/{path.stem}",
                row["test_acc1"],
                int(row["operations"]) // 1000,
            )
    options = {
        name: x if isinstance(x, (int, float)) else one_line(str(x))
        for name, x in plain(session.settings).items()
    }
    writer.add_hparams(
        options,
        {f"test_acc1/exit_{row['exit']:.0f}": row["acc1"] for row in read_csv(run.anytime)},
        run_name=".",
    )
