"""What predict.py does: load a network, choose a policy, answer images as they are read, write rows as they come.

status = answer_all(predict.parse(["folder/", "--budget", "2ms"]), Path("save/demo/IMTA/best.safetensors"))
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adaptive_inference.budgeted import NONE_LEAVE
from adaptive_inference.choosing import allowed_points, choose
from adaptive_inference.fold import fold, folded_for
from adaptive_inference.policies import Policy, read_policy
from adaptive_inference.predictor import AdaptivePredictor, Prediction
from adaptive_inference.promises.deadlines import AnytimePredictor, BudgetPredictor
from adaptive_inference.promises.ensemble import operations_together
from adaptive_inference.promises.risk import LEVEL, MaxLoss
from adaptive_inference.promises.timing import measure_blocks
from engine.answers import WRITERS, opened
from engine.checkpoint import load_saved
from engine.device import is_out_of_memory
from image_data.folders import LEFT_OUT, find_images
from image_data.reading import read_image
from image_data.transforms import evaluation_transform
from models import count_operations
from models.files import WEIGHTS, policy_path
from models.saved import DataInfo
from utils import UserError, complain, is_terminal

DEFAULT_SHARE = 0.5  # of all operations
BATCH_SIZE = 64
WARM_UP_IMAGES = 8
BEST_CLASSES = 5


def answer_all(arguments: argparse.Namespace, path: Path) -> int:
    """Answer the images that the command line of predict.py names, with the network of this file; returns the exit status.

    Raises:
        UserError: one line: the network, its policy, a wish or the output is impossible, or memory is short.
    """
    try:
        return _answer_all(arguments, path)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "not enough memory for so many images at a time; a smaller --batch-size needs less"
        ) from None


def _answer_all(arguments: argparse.Namespace, path: Path) -> int:
    network, device = load_network(path, arguments), _device(arguments.device)
    info, batch_size = (
        network.description.data,
        arguments.batch_size or (1 if arguments.deadline is not None else BATCH_SIZE),
    )
    predictor, policy, policy_line = make_predictor(arguments, path, network.to(device), batch_size)
    answering = Answering(predictor, arguments.deadline)
    files, complaints = find_images(arguments.paths)
    skipped, interrupted = sum(not complaint.startswith(LEFT_OUT) for complaint in complaints), False
    shown = is_terminal(sys.stderr) and (arguments.output is not None or not is_terminal(sys.stdout))
    bar = tqdm(total=len(files), unit="image", disable=not shown)
    with opened(arguments.output) as stream:
        writer = WRITERS[arguments.format](stream, info.class_names, {"model": str(path), "policy": policy})
        origin = ", the newest one" if path.parent != WEIGHTS else ", as there is no run of yours"
        for line in (f"network {path}{'' if arguments.model else origin}", policy_line, *complaints):
            _say(line)
        try:
            for names, images in _batches(files, info, batch_size):
                if images is not None:
                    writer.rows(answering.answer(names, images.to(device)))
                else:
                    skipped += len(names)
                bar.update(len(names))
        except KeyboardInterrupt:
            interrupted = True
        bar.close()
        summary = answering.summary()
        writer.end(summary)
    _say(_in_words(summary))
    if interrupted:
        _say(f"interrupted; the {summary['images']} answers so far are kept")
        return 130
    return 1 if skipped else 0


def load_network(path: Path, arguments: argparse.Namespace) -> nn.Module:
    """Load a network with its ``description``.

    Raises:
        UserError: The file cannot be read, or --classes or --image-size disagree with it.
    """
    network = load_saved(path, {}).network
    known = network.description.data.image_size
    if arguments.classes is not None or arguments.image_size not in (None, known):
        raise UserError(
            f"{path} knows its classes and its image size, {known}: --classes and --image-size belong to the command that "
            "converts released checkpoints, python -m engine.convert"
        )
    return network


def make_predictor(
    arguments: argparse.Namespace, path: Path, network: nn.Module, batch_size: int
) -> tuple[AdaptivePredictor, dict[str, Any], str]:
    """A predictor that grants the wishes of the command line, what decides who leaves for JSON, and the same in a line.

    Args:
        path: of the network.
        network: with its description, on the device that will answer.

    Raises:
        UserError: a wish cannot be granted.
    """
    source, deadline, budget = arguments.policy or policy_path(path), arguments.deadline, arguments.budget
    asked = any(wish is not None for wish in (budget, arguments.accuracy, arguments.max_loss))
    curve = read_policy(source) if asked or arguments.policy or arguments.rule or source.exists() else None
    form = fold(network) if curve is None else folded_for(network, curve, source)
    policy, timing, chosen = Policy((NONE_LEAVE,) * form.num_exits), None, {}
    if deadline is not None or (budget is not None and budget.unit == "ms"):
        size, device = network.description.data.image_size, next(form.parameters()).device
        timing = measure_blocks(
            form, torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device), batch_size
        )
    if deadline is not None:
        if curve is not None:
            policy = replace(curve.of_rule(None)[0].policy, thresholds=policy.thresholds)
        predictor = AnytimePredictor(form, deadline, timing, policy)
        line = f"each batch of {batch_size} gets the last answer finished within {deadline:g} ms; {timing}"
    elif curve is None:
        predictor = AdaptivePredictor(form, policy)
        line = f"there is no {source}, which --evalmode dynamic writes: every image runs the whole network"
    else:
        level = LEVEL if arguments.confidence_level is None else arguments.confidence_level
        max_loss = (
            None if arguments.max_loss is None else MaxLoss(arguments.max_loss, level, arguments.disagreement)
        )
        expected = why = ""
        if timing is not None:
            predictor = BudgetPredictor(
                form,
                allowed_points(curve, arguments.accuracy, max_loss, arguments.rule),
                budget.amount,
                timing,
            )
            point = predictor.point
            expected = f", {timing.milliseconds(point.shares):.3g} ms an image expected ({timing}); as time is really spent, others follow"
        else:
            if asked:
                operations = budget and budget.amount * (
                    1e6 if budget.unit == "M" else curve.operations[-1] / 100
                )
                point = choose(
                    curve, operations, accuracy=arguments.accuracy, max_loss=max_loss, rule=arguments.rule
                )
            else:
                point = curve.nearest(DEFAULT_SHARE * curve.operations[-1], arguments.rule)
                why = "; nothing was asked for (--budget, --max-loss, --deadline): about half of the network"
            predictor = AdaptivePredictor(form, point.policy)
        policy, chosen = (
            point.policy,
            {"rule": point.rule, "p": point.p, "val_acc1": round(point.val_acc1, 3)},
        )
        if max_loss is not None:
            chosen["promise"], why = str(max_loss), f"; certain to {max_loss}"
        share = point.operations / curve.operations[-1]
        line = (
            f"policy {point.p} of the {point.rule} rule: on held-out images {point.val_acc1:.2f} % right with "
            f"{point.operations / 1e6:.2f} M operations ({100 * share:.0f} % of the network){expected}{why}"
        )
    about = {
        **chosen,
        "measure": policy.measure,
        "thresholds": policy.thresholds,
        "deadline_milliseconds": deadline,
    }
    return predictor, about, line


class Answering:
    """Makes rows of a predictor's answers, and counts them.

    Args:
        predictor: whose network has its description.
        deadline: of a batch in milliseconds, if it has one.
    """

    def __init__(self, predictor: AdaptivePredictor, deadline: float | None):
        self.predictor, self.info, self.deadline = predictor, predictor.network.description.data, deadline
        self.operations = count_operations(predictor.network, self.info.image_size)
        if predictor.policy.ensemble:
            self.operations = operations_together(self.operations, predictor.network.num_classes)
        self.exits = torch.zeros(len(self.operations), dtype=torch.int64)
        self.num_late, self.num_calls, self.milliseconds = 0, 0, 0.0

    def answer(self, names: list[Path], images: Tensor) -> list[dict]:
        """Rows for images (n, 3, H, W), uint8."""
        if self.num_calls == 0:
            self.predictor(images[:WARM_UP_IMAGES])
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

    def summary(self) -> dict[str, Any]:
        """Of the images answered so far."""
        images = int(self.exits.sum())
        count = max(images, 1)
        spent = sum(n * number for n, number in zip(self.exits.tolist(), self.operations, strict=True))
        return {
            "images": images,
            "operations": round(spent / count),
            "share_of_operations": round(spent / count / self.operations[-1], 4),
            "share_of_exits": [round(n / count, 4) for n in self.exits.tolist()],
            "network_milliseconds": round(self.milliseconds / count, 3),
            "late": self.num_late / max(self.num_calls, 1) if self.deadline is not None else None,
        }


def _in_words(summary: dict[str, Any]) -> str:
    count, late, shares = (summary[name] for name in ("images", "late", "share_of_exits"))
    if not count:
        return "no image was answered"
    return (
        f"{count} image{'s' if count > 1 else ''}: {summary['operations'] / 1e6:.2f} M operations an image "
        f"({100 * summary['share_of_operations']:.0f} % of all), {summary['network_milliseconds']:.3g} ms in the network, reading not "
        f"counted; left at exits 1 to {len(shares)}: {' / '.join(f'{100 * share:.0f}' for share in shares)} %"
        + ("" if late is None else f"; {100 * late:.1f} % of the answers were late")
    )


def _batches(
    files: list[Path], info: DataInfo, batch_size: int
) -> Iterator[tuple[list[Path], Tensor | None]]:
    """Names and bytes (n, 3, H, W) of readable images; names and None for one that is not, after a line on standard error."""
    transform = evaluation_transform(info.image_size, info.crop_share, info.interpolation)
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
