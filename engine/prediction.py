"""What predict.py does: load a network, choose a policy, answer images as they are read, write rows as they come.

status = answer_all(predict.parse(["folder/", "--budget", "2ms"]), Path("save/demo/IMTA/best.safetensors"))
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adaptive_inference.budgeted import NONE_LEAVE
from adaptive_inference.form import form_for, inference_form
from adaptive_inference.policies import Point, Policy, PolicyCurve, allowed_points, choose, read_policy
from adaptive_inference.predictor import AdaptivePredictor, AnytimePredictor, BudgetPredictor, Prediction
from adaptive_inference.risk import CERTIFICATE, MaxLoss
from adaptive_inference.timing import BlockTimes, measure_blocks
from datasets import LEFT_OUT, NORMALIZATION, DataInfo, evaluation_transform, find_images, read_image
from engine.answers import WRITERS, opened
from engine.checkpoint import load_saved
from engine.device import is_out_of_memory
from models import count_operations
from models.files import WEIGHTS, policy_path
from utils import UserError, complain, is_terminal

DEFAULT_SHARE = 0.5  # of all operations
BATCH_SIZE = 64
WARM_UP_IMAGES = 8
BEST_CLASSES = 5


def answer_all(arguments: argparse.Namespace, path: Path) -> int:
    """Answer the images that the command line of predict.py names, with the network of this file; returns the exit status.

    Raises:
        UserError: one line: the network, its policy, a wish or the output is impossible.
    """
    network = load_network(path, arguments)
    device = _device(arguments.device)
    answering = Answering(arguments, path, network, device)
    files, complaints = find_images(arguments.paths)
    skipped, interrupted = sum(not complaint.startswith(LEFT_OUT) for complaint in complaints), False
    shown = is_terminal(sys.stderr) and (arguments.output is not None or not is_terminal(sys.stdout))
    bar = tqdm(total=len(files), unit="image", disable=not shown)
    with opened(arguments.output) as stream:
        writer = WRITERS[arguments.format](stream, answering.info.class_names, {"model": str(path), "policy": answering.policy()})
        origin = ", the newest one" if path.parent != WEIGHTS else ", as there is no run of yours"
        _say(f"network {path}{'' if arguments.model else origin}")
        _say(answering.policy_line)
        for complaint in complaints:
            _say(complaint)
        try:
            for names, images in _batches(files, network.description.image_size, answering.batch_size):
                if images is not None:
                    writer.rows(answering.answer(names, images))
                else:
                    skipped += len(names)
                bar.update(len(names))
        except KeyboardInterrupt:
            interrupted = True
        bar.close()
        writer.end(answering.summary())
    _say(answering.summary_line())
    if interrupted:
        _say(f"interrupted; the {answering.num_answered} answers so far are kept")
        return 130
    return 1 if skipped else 0


def load_network(path: Path, arguments: argparse.Namespace) -> nn.Module:
    """A network with its ``description``; that of a released file comes from --classes and --image-size.

    Raises:
        UserError: the file cannot be read, or is of the released program and --classes is missing.
    """
    saved = load_saved(path, {})
    network, info = saved.network, saved.data
    if info is None:
        if arguments.classes is None:
            raise UserError(f"{path} is of the released program, which stores no class names; give --classes FILE, one name a line")
        names = _class_names(arguments.classes, network.num_classes)
        data = "imagenet" if not network.trunk.small_inputs else "cifar10" if len(names) == 10 else "cifar100"
        size = arguments.image_size or (32 if network.trunk.small_inputs else 224)
        info = DataInfo(data, names, size, *map(list, NORMALIZATION[data]), 0, "")
    elif arguments.classes is not None or arguments.image_size not in (None, info.image_size):
        raise UserError(f"{path} knows its classes and its image size, {info.image_size}: --classes and --image-size are for others")
    if network.description is None:
        network.description = info
    return network


class Answering:
    """A network with a policy on a device, and counts of what it answered.

    Args:
        arguments: of the command line.
        path: of the network.
        network: with its description.
    """

    def __init__(self, arguments: argparse.Namespace, path: Path, network: nn.Module, device: torch.device):
        self.path, self.info, self.device = path, network.description, device
        self.batch_size = arguments.batch_size or (1 if arguments.deadline is not None else BATCH_SIZE)
        self.deadline, self.num_late, self.num_calls, self.milliseconds = arguments.deadline, 0, 0, 0.0
        self.operations = count_operations(network, self.info.image_size)
        self.exits = torch.zeros(network.num_exits, dtype=torch.int64)
        self.point: Point | None = None
        self.is_warm = False
        curve = self._curve(arguments, path)
        form = inference_form(network) if curve is None else form_for(network, curve, arguments.policy or policy_path(path))
        form.to(device)
        with _memory_in_words(self.batch_size, self.info.image_size):
            self._choose(arguments, form, curve)

    @property
    def num_answered(self) -> int:
        """Images answered so far."""
        return int(self.exits.sum())

    def answer(self, names: list[Path], images: Tensor) -> list[dict]:
        """Rows for images (n, 3, H, W), uint8."""
        images = images.to(self.device)
        with _memory_in_words(len(images), self.info.image_size):
            if not self.is_warm:
                self.predictor(images[:WARM_UP_IMAGES])
                self.is_warm = True
            began = time.perf_counter()
            prediction = Prediction(*(values.cpu() for values in self.predictor(images)))  # waits for the device
            milliseconds = 1e3 * (time.perf_counter() - began)
        self.num_calls += 1
        self.num_late += self.deadline is not None and milliseconds > self.deadline
        self.milliseconds += milliseconds
        self.exits += torch.bincount(prediction.exits, minlength=len(self.exits))
        best = prediction.probs.topk(min(BEST_CLASSES, prediction.probs.shape[1]))
        columns = (best.indices.tolist(), best.values.tolist(), prediction.exits.tolist())
        return [
            {
                "file": os.fsencode(name).decode("utf-8", "replace"),
                "class": self.info.class_names[indices[0]],
                "confidence": round(probs[0], 4),
                "exit": exit + 1,
                "operations": self.operations[exit],
                "network_milliseconds": round(milliseconds / len(names), 3),
                "top5": {self.info.class_names[i]: round(p, 4) for i, p in zip(indices, probs, strict=True)},
            }
            for name, indices, probs, exit in zip(names, *columns, strict=True)
        ]

    def policy(self) -> dict[str, Any]:
        """What decides who leaves, for JSON."""
        chosen = {} if self.point is None else {"rule": self.point.rule, "p": self.point.p, "val_acc1": round(self.point.val_acc1, 3)}
        policy = self.predictor.policy
        return {**chosen, "measure": policy.measure, "thresholds": policy.thresholds, "deadline_milliseconds": self.deadline}

    def summary(self) -> dict[str, Any]:
        """Of the images answered so far."""
        count = max(self.num_answered, 1)
        spent = sum(n * number for n, number in zip(self.exits.tolist(), self.operations, strict=True))
        return {
            "images": self.num_answered,
            "operations": round(spent / count),
            "share_of_operations": round(spent / count / self.operations[-1], 4),
            "share_of_exits": [round(n / count, 4) for n in self.exits.tolist()],
            "network_milliseconds": round(self.milliseconds / count, 3),
            "late": self.num_late / max(self.num_calls, 1) if self.deadline is not None else None,
        }

    def summary_line(self) -> str:
        """``summary`` in words."""
        s = self.summary()
        if not s["images"]:
            return "no image was answered"
        images = "1 image" if s["images"] == 1 else f"{s['images']} images"
        late = "" if s["late"] is None else f"; {100 * s['late']:.1f} % of the answers were late"
        return (
            f"{images}: {s['operations'] / 1e6:.2f} M operations an image ({100 * s['share_of_operations']:.0f} % of all), "
            f"{s['network_milliseconds']:.3g} ms in the network, reading not counted; "
            f"left at exits 1 to {len(self.exits)}: {' / '.join(f'{100 * share:.0f}' for share in s['share_of_exits'])} %{late}"
        )

    def _curve(self, arguments: argparse.Namespace, path: Path) -> PolicyCurve | None:
        """The policies; None where nothing needs them."""
        wishes = (arguments.policy, arguments.budget, arguments.accuracy, arguments.max_loss, arguments.point, arguments.rule)
        source = arguments.policy or policy_path(path)
        return read_policy(source) if source.exists() or any(wish is not None for wish in wishes) else None

    def _choose(self, arguments: argparse.Namespace, form: nn.Module, curve: PolicyCurve | None) -> None:
        """Set the predictor, and the line that says what it does."""
        size = self.info.image_size
        example = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.device)
        budget, timing, everything = arguments.budget, None, Policy((NONE_LEAVE,) * form.num_exits)
        if arguments.deadline is not None or (budget is not None and budget.unit == "ms"):
            timing = measure_blocks(form, example, self.batch_size)
        if arguments.deadline is not None:
            if curve is not None:
                everything = replace(curve.of_rule(None)[0].policy, thresholds=everything.thresholds)
            self.predictor = AnytimePredictor(form, arguments.deadline, timing, everything)
            self.policy_line = f"each batch of {self.batch_size} gets the last answer finished within {arguments.deadline:g} ms; {timing}"
            return
        if curve is None:
            self.predictor = AdaptivePredictor(form, everything)
            self.policy_line = f"there is no {policy_path(self.path)}, which --evalmode dynamic writes: every image runs the whole network"
            return
        if timing is None:
            self.point = _point(arguments, curve)
            self.predictor = AdaptivePredictor(form, self.point.policy)
        else:
            points = allowed_points(curve, arguments.accuracy, _max_loss(arguments), arguments.rule)
            self.predictor = BudgetPredictor(form, points, budget.amount, timing)
            self.point = self.predictor.point
        self.policy_line = _policy_line(arguments, curve, self.point, timing)


def _point(arguments: argparse.Namespace, curve: PolicyCurve) -> Point:
    if arguments.point is not None:
        return curve.point(arguments.point, arguments.rule)
    if arguments.budget is None and arguments.accuracy is None and arguments.max_loss is None:
        return curve.nearest(DEFAULT_SHARE * curve.operations[-1], arguments.rule)
    operations = None
    if arguments.budget is not None:
        operations = arguments.budget.amount * (1e6 if arguments.budget.unit == "M" else curve.operations[-1] / 100)
    return choose(curve, operations, accuracy=arguments.accuracy, max_loss=_max_loss(arguments), rule=arguments.rule)


def _max_loss(arguments: argparse.Namespace) -> MaxLoss | None:
    if arguments.max_loss is None:
        return None
    level = CERTIFICATE["level"] if arguments.confidence_level is None else arguments.confidence_level
    return MaxLoss(arguments.max_loss, level, arguments.disagreement)


def _policy_line(arguments: argparse.Namespace, curve: PolicyCurve, point: Point, timing: BlockTimes | None) -> str:
    wishes = (arguments.budget, arguments.accuracy, arguments.max_loss, arguments.point)
    why = (
        ""
        if any(wish is not None for wish in wishes)
        else "; nothing was asked for (--budget, --max-loss, --deadline): about half of the network"
    )
    expected = (
        f", {timing.milliseconds(point.shares):.3g} ms an image expected ({timing}); as time is really spent, others follow"
        if timing
        else ""
    )
    return (
        f"policy {point.p} of the {point.rule} rule: on held-out images {point.val_acc1:.2f} % right with {point.operations / 1e6:.2f} M "
        f"operations ({100 * point.operations / curve.operations[-1]:.0f} % of the network){expected}{why}"
    )


def _batches(files: list[Path], image_size: int, batch_size: int) -> Iterator[tuple[list[Path], Tensor | None]]:
    """Names and bytes (n, 3, H, W) of readable images; names and None for one that is not, after a line on standard error."""
    transform = evaluation_transform(image_size)
    names, images = [], []
    for path in files:
        try:
            image = read_image(path, transform)
        except UserError as error:
            _say(f"{error}; skipped")
            yield [path], None
            continue
        names.append(path)
        images.append(image)
        if len(names) == batch_size:
            yield names, torch.stack(images)
            names, images = [], []
    if names:
        yield names, torch.stack(images)


@contextmanager
def _memory_in_words(batch_size: int, image_size: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"not enough memory for {batch_size} images of {image_size} pixels at a time; a smaller --batch-size needs less"
        ) from None


def _class_names(path: Path, count: int) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {path} cannot be read: {error.strerror if isinstance(error, OSError) else error}") from None
    if len(names) != count:
        raise UserError(f"--classes {path} holds {len(names)} names, the network knows {count} classes")
    return names


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _say(line: str) -> None:
    with tqdm.external_write_mode(file=sys.stderr):
        complain(f"predict.py: {line}")
