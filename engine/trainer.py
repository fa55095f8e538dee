"""The training loop of both stages: schedule, held-out accuracy, checkpoints, resuming.

``engine.stepper`` makes the steps.

Example:
    progress = train(Trainer(objective, description, data, session), checkpoint)

Each stage provides the objective, a module ``(images, targets) -> (losses (N,), logits (N, K, C))`` with the
``network`` that is trained.
"""

import math
import time
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_inference import fold
from dataloader import Data
from engine.averaging import MEASURED_IMAGES, measure_batch_norm, moving_average
from engine.checkpoint import report_damage, save_checkpoint, save_network
from engine.collect import accuracy_per_exit
from engine.interruption import Interruptions
from engine.runtime.compiling import is_compiler_error, reason_of
from engine.runtime.device import seed_step
from engine.runtime.distributed import launch_id
from engine.runtime.signals import Interrupted
from engine.session import Session
from engine.stepper import Stepper
from models.description import Description
from models.module_state import has_finite_weights
from utils import UserError, duration, percent

LOSS = "loss (sum over exits)"


@dataclass
class Progress:
    """The position of a run in its training.

    Attributes:
        epoch: Completed epochs.
        step: Completed steps of the next epoch.
        best_accuracy: Held-out top-1 accuracy of the best epoch, mean over exits, in percent; -1 without
            held-out images.
        best_loss: Held-out loss of the best epoch, sum over exits.
        best_epoch: The best epoch, 0 before the first one.
        seconds: Time spent on the current epoch.
        skipped_steps: Steps of the whole run that fp16 scaling left out, because a gradient was not finite.
        history: A row of figures for each epoch.
    """

    epoch: int = 0
    step: int = 0
    best_accuracy: float = -1.0
    best_loss: float = math.inf
    best_epoch: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    history: list[dict] = field(default_factory=list)


class Meters:
    """Sums over an epoch that stay on the device, so that no step waits for them.

    Args:
        num_exits: Number of exits, K.
        device: Device of the sums.
        only_finite: Leave out images whose loss is not finite.
    """

    def __init__(self, num_exits: int, device: torch.device, only_finite: bool = False):
        self.only_finite = only_finite
        # Images, loss, and correct predictions of every exit.
        self.totals = torch.zeros(2 + num_exits, dtype=torch.float64, device=device)

    def update(self, losses: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: losses (N,), logits (N, K, C), targets (N,)."""
        correct = logits.argmax(dim=2) == targets[:, None]
        if self.only_finite:
            finite = losses.isfinite()
            self.totals[0] += finite.sum()
            losses, correct = losses.where(finite, 0), correct & finite[:, None]
        else:
            self.totals[0] += len(targets)
        self.totals[1] += losses.sum(dtype=torch.float64)
        self.totals[2:] += correct.sum(dim=0)

    @staticmethod
    def means(totals: Tensor) -> tuple[float, list[float]]:
        """Return the mean loss, and the accuracy of every exit in percent."""
        images, loss, *correct = totals.tolist()
        return loss / images if images else math.nan, [100 * c / max(images, 1) for c in correct]


def train(trainer: "Trainer", checkpoint: dict[str, Any] | None = None) -> Progress:
    """Train until ``epochs`` of the settings are done.

    ``last.pt``, the best epoch and ``log.jsonl`` are left in the run's directory.

    The best epoch has the highest held-out top-1 accuracy, mean over exits. Ties go to the lower held-out
    loss, then to the later epoch. Without held-out images, the last epoch is the best.

    Args:
        trainer: The training, before its first step.
        checkpoint: The checkpoint to resume from, None to start.

    Raises:
        Interrupted: A signal asked to stop; everything is saved.
        UserError: The loss is not finite, a file cannot be written, or ``checkpoint`` is damaged.
    """
    session = trainer.session
    if checkpoint is not None:
        with report_damage(session.directory.last):
            trainer.restore(checkpoint)
    with session.requests.deferred():
        while trainer.progress.epoch < session.settings.epochs:
            trainer.run_epoch()
    return trainer.progress


def learning_rate(settings: Namespace, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate at a step: linear warm-up, then cosine to 0, or a drop at each milestone.

    It is a function of the step alone, so that a resumed run needs no state for it.

    Args:
        settings: Settings with lr, lr_type, lr_milestones (epochs), decay_rate, warmup_epochs, epochs.
        step: Counted over all epochs, from 0.
        steps_per_epoch: Steps of an epoch.
    """
    epoch = step / steps_per_epoch
    if epoch < settings.warmup_epochs:
        return settings.lr * (step + 1) / math.ceil(settings.warmup_epochs * steps_per_epoch)
    if settings.lr_type == "cosine":
        progress = (epoch - settings.warmup_epochs) / max(settings.epochs - settings.warmup_epochs, 1e-9)
        return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * settings.decay_rate ** sum(
        epoch >= milestone for milestone in settings.lr_milestones
    )


def _refuse_own_parameters(objective: nn.Module) -> None:
    """Raise ``RuntimeError`` if an objective trains parameters outside of its network."""
    saved = set(objective.network.parameters())
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad and parameter not in saved:
            raise RuntimeError(
                f"{type(objective).__name__} has a parameter of its own, {name}: put it into the network, "
                "as nothing else is saved"
            )


class Trainer:
    """The training state and epoch loop of a run. Constructing it writes no file.

    Args:
        objective: The objective, whose ``network`` is trained.
        description: Description of the network, for the files of the run.
        data: The images to train on and to choose the best epoch with.
        session: The run.
    """

    def __init__(self, objective: nn.Module, description: Description, data: Data, session: Session):
        self.objective, self.description, self.data, self.session = objective, description, data, session
        self.network = objective.network
        _refuse_own_parameters(objective)
        self.stepper = Stepper(objective, session.settings, session.processes)
        self.meters = Meters(
            self.network.num_exits, session.processes.device, only_finite=self.stepper.scaler.is_enabled()
        )
        self.progress = Progress()
        self.epoch_began = 0.0
        self.interruptions = Interruptions(session, self._save, self._where)
        decay = session.settings.ema_decay
        self.average = None if decay is None else moving_average(self.network, decay)

    @property
    def evaluated_network(self) -> nn.Module:
        """The network that is evaluated and kept: the trained one, or its moving average."""
        return self.network if self.average is None else self.average.module

    def run_epoch(self) -> None:
        """Run the remaining steps of an epoch, evaluate and save."""
        settings, progress, log = self.session.settings, self.progress, self.session.log
        steps, interruptions = len(self.data.train), self.interruptions
        self.epoch_began = time.monotonic()
        self.objective.train()
        log.begin_epoch(f"epoch {progress.epoch + 1}/{settings.epochs}", progress.step, steps)
        batches = self.data.train.epoch(progress.epoch, progress.step)
        for images, targets in interruptions.batches(batches, lambda: progress.step > 0):
            if not self.stepper.is_prepared:
                self._prepare(images, targets)
            self._train_step(images, targets)
            log.advance()
            if progress.step % settings.print_freq == 0:
                self._report()
            interruptions.after_step(progress.step, steps)
        log.end_epoch()
        # Before the evaluation, which may fail, or take longer than the sender of a signal waits.
        self._save()
        self._finish_epoch()
        # After the last epoch too: --resume then runs the evaluation that is left.
        if signal_number := interruptions.stop_signal():
            raise Interrupted(signal_number, True, f" after epoch {self.progress.epoch} of {settings.epochs}")

    def _train_step(self, images: Tensor, targets: Tensor) -> None:
        settings, progress, steps = self.session.settings, self.progress, len(self.data.train)
        seed_step(settings.seed, progress.epoch, progress.step, self.session.processes.rank)
        step_of_run = progress.epoch * steps + progress.step
        self.stepper.step(images, targets, learning_rate(settings, step_of_run, steps), self.meters.update)
        if self.average is not None:
            self.average.update_parameters(self.network)
        progress.step += 1
        progress.skipped_steps += self.stepper.was_skipped

    def _where(self) -> str:
        progress, epochs = self.progress, self.session.settings.epochs
        epoch, steps = progress.epoch + 1, len(self.data.train)
        return f" in epoch {epoch} of {epochs}, after step {progress.step} of {steps}"

    def _prepare(self, images: Tensor, targets: Tensor) -> None:
        """Compile the training step before the first batch.

        If compiling fails and ``--compile`` was ``auto``, all processes train eagerly. A signal stops the
        compiling at once.
        """
        session, problem = self.session, None
        compiles = session.settings.compile != "off"
        if compiles:
            session.log.line(
                "compiling the training step: one to three minutes the first time, later from PyTorch's cache"
            )
        try:
            with session.requests.immediate() if compiles else nullcontext():
                self.stepper.prepare(images, targets)
        except Exception as error:
            if not (is_compiler_error(error) or isinstance(error, OSError)):
                raise
            problem = reason_of(error)
        if not session.processes.all_reduce_max(int(problem is not None)):
            return
        problem = problem or "it fails in another process"
        if not session.may_train_eagerly:
            raise UserError(f"the training step cannot be compiled: {problem}; --compile off trains without")
        session.log.line(f"training continues without compiled code: {problem}")
        self.stepper.train_eagerly()
        # A resumed run trains eagerly, too.
        self.description = replace(self.description, recipe={**self.description.recipe, "compile": "off"})

    def _report(self) -> None:
        loss, accuracies = Meters.means(self.session.processes.all_reduce_sum(self.meters.totals))
        self._refuse_infinite(loss)
        self.session.log.step(
            self.progress.step,
            self.session.settings.batch_size,
            f"{LOSS} {loss:.4f}, last exit {accuracies[-1]:.2f} %",
        )

    def _refuse_infinite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise self._divergence(f"the loss is {loss}")

    def _divergence(self, what: str) -> UserError:
        """Return the error of a training that diverged; ``what`` says how it shows."""
        last = (
            f"last good checkpoint: {self.session.directory.last}"
            if self.session.directory.last.exists()
            else "nothing was saved yet"
        )
        return UserError(
            f"{what} in epoch {self.progress.epoch + 1}, "
            f"by step {self.progress.step}, at learning rate {self.stepper.learning_rate:.4g}; "
            f"{last}; try a smaller --lr, --warmup-epochs or --clip-grad"
        )

    def _finish_epoch(self) -> None:
        """Evaluate the epoch whose steps are done, write it and report it."""
        progress = self.progress
        totals = self.session.processes.all_reduce_sum(self.meters.totals)
        loss, train_acc1 = Meters.means(totals)
        self._refuse_infinite(loss)
        training_seconds = self._seconds()
        row = {
            "epoch": progress.epoch + 1,
            "lr": self.stepper.learning_rate,
            "loss": loss,
            "train_acc1": train_acc1,
        }
        row |= self._evaluate_held_out()
        is_best = row["best"] = self._note_if_best(row)
        row["images_per_second"] = totals[0].item() / training_seconds
        row["seconds"] = self._seconds()
        if self.stepper.scaler.is_enabled():
            row["skipped_steps"] = progress.skipped_steps
        row = {name: _rounded(value) for name, value in row.items()}
        progress.history.append(row)
        self.meters.totals.zero_()
        after = replace(progress, epoch=progress.epoch + 1, step=0, seconds=0.0)
        self.write_checkpoint(is_best, after, self.meters.totals)
        self.progress = after
        self._report_epoch(row)

    def _note_if_best(self, row: dict[str, Any]) -> bool:
        """Compare an epoch with the best one so far, and note it if it is better."""
        progress, is_best = self.progress, True
        if self.data.val.num_images:
            accuracy, loss = round(row["val_mean_acc1"], 6), row["val_loss"]
            is_best = (accuracy, -loss) >= (progress.best_accuracy, -progress.best_loss)
            if is_best:
                progress.best_accuracy, progress.best_loss = accuracy, loss
        if is_best:
            progress.best_epoch = progress.epoch + 1
        return is_best

    def _evaluate_held_out(self) -> dict[str, Any]:
        """Return the figures of the held-out images, none if there are no such images."""
        if self.average is not None:
            self._measure_average()
        if not self.data.val.num_images:
            return {}
        processes = self.session.processes
        processes.share_buffers(self.evaluated_network)
        # The network predicts folded, in the precision of training.
        folded = fold(self.evaluated_network, self.session.settings.channels_last, self.stepper.dtype)
        acc1, acc5, loss = accuracy_per_exit(folded, self.data.val, processes)
        return {"val_acc1": acc1, "val_acc5": acc5, "val_loss": loss, "val_mean_acc1": sum(acc1) / len(acc1)}

    def _report_epoch(self, row: dict[str, Any]) -> None:
        epoch, epochs = self.progress.epoch, self.session.settings.epochs
        accuracies = [percent(acc1, self.data.val.num_images) for acc1 in row.get("val_acc1", [])]
        held_out = " ".join(accuracies) or "none"
        best = " (best)" if row["best"] else ""
        left = duration(row["seconds"] * (epochs - epoch))
        self.session.log.line(
            f"epoch {epoch}/{epochs}: {LOSS} {row['loss']:.4f}, held-out top-1 by exit {held_out}{best}, "
            f"{row['images_per_second']:,.0f} images/s, {row['seconds']:.1f} s, {left} left"
        )
        self.session.log.scalars(row, epoch)

    def _measure_average(self) -> None:
        """Measure the BatchNorm statistics of the average on the first training images of this epoch."""
        count = math.ceil(MEASURED_IMAGES / self.session.settings.batch_size)
        batches = islice(self.data.train.epoch(self.progress.epoch), count)
        accumulate, processes = self.session.settings.accumulate, self.session.processes
        # Split as ``Stepper.step`` and DataParallel do.
        num_gpus = max(1, len(processes.gpu_ids))
        micro_batches = (part for images, _ in batches for part in images.tensor_split(accumulate))
        chunks = (chunk for part in micro_batches for chunk in part.chunk(num_gpus))
        measure_batch_norm(self.average.module, self.network, chunks, self.stepper.dtype, processes)

    def _save(self) -> None:
        """Save in the middle of an epoch; the meters of all processes go into one."""
        totals = self.session.processes.all_reduce_sum(self.meters.totals)
        self._refuse_infinite(Meters.means(totals)[0])
        self.write_checkpoint(False, replace(self.progress, seconds=self._seconds()), totals)

    def _seconds(self) -> float:
        """Return the time spent on the current epoch, that before an interruption included."""
        return self.progress.seconds + time.monotonic() - self.epoch_began

    def write_checkpoint(self, is_best: bool, progress: Progress, totals: Tensor) -> None:
        """Write ``last.pt``; before it ``best.safetensors``, if this epoch is the best so far.

        Args:
            is_best: Whether this epoch is the best so far.
            progress: The position of the run to write.
            totals: Sums of the current epoch, over all processes (``Meters.totals``).
        """
        if not self.session.processes.is_main:
            return
        if not has_finite_weights(self.network):
            raise self._divergence("not all weights are finite numbers")
        if is_best:
            accuracy = {
                name: values
                for name, values in progress.history[-1].items()
                if name in ("val_acc1", "val_acc5")
            }
            description = replace(self.description, epoch=progress.epoch, accuracy=accuracy)
            save_network(self.session.directory.best, self.evaluated_network, description, self.data.split)
        checkpoint = {
            "description": asdict(self.description),
            **self.data.split.to_tensors(),
            "launch": launch_id(),
            "state_dict": self.network.state_dict(),
            **vars(progress),
            **self.stepper.state_dict(),
            "random_state": torch.get_rng_state(),
            "totals": totals,
        }
        if self.average is not None:
            checkpoint["average"] = self.average.state_dict()
        save_checkpoint(self.session.directory.last, checkpoint)
        self.session.log.write_history(self.session.directory.log_file, progress.history)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, except the weights, which the network has already."""
        self.stepper.load_state_dict(checkpoint)
        torch.set_rng_state(checkpoint["random_state"])
        if self.average is not None:
            self.average.load_state_dict(checkpoint["average"])
        names = vars(self.progress).keys() & checkpoint.keys()
        self.progress = Progress(**{name: checkpoint[name] for name in names})
        if self.session.processes.is_main:  # it holds the sums of all
            self.meters.totals.copy_(checkpoint["totals"])
        self.session.log.write_history(self.session.directory.log_file, self.progress.history)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_rounded(v) for v in value] if isinstance(value, list) else value
