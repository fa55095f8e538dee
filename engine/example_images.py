"""Easy and hard images, as in the MSDNet paper's figure 5.

Example:
    easy, hard = example_images(logits, targets, policy)
    figure = examples_figure(lambda i: images[i], targets, (easy, hard), class_names)

Easy images leave at the first exit with the right class; hard ones only the last exit gets right.
"""

from collections.abc import Callable, Sequence
from textwrap import wrap

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from adaptive_inference.confidence import assign_exits, confidence_by_exit
from adaptive_inference.policies import Policy

ROWS, COLUMNS = 4, 5  # classes, and images of each kind, at most
GAP, WIDE_GAP = 0.08, 0.4  # between images, and between the two kinds, in image widths
LABEL_LENGTH = 18  # characters of a line of a class name
TITLES = ("left at the first exit, right", "only the last exit is right")


def example_images(logits: Tensor, targets: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """Return the indices of the easy images, most confident first, and of the hard ones, hardest first.

    Easy: left at the first exit at which any image of the set leaves, with the right class. Hard: reached the
    last exit, which is right, while every other exit is wrong.

    Args:
        logits: Logits of every exit, (K, N, C).
        targets: (N,).
        policy: Policy by which images leave.
    """
    confidence, classes = confidence_by_exit(logits, policy.measure)
    correct = classes == targets
    exits = assign_exits(confidence, torch.tensor(policy.thresholds))
    first, last = exits.min(), len(logits) - 1
    easy = ((exits == first) & correct[first]).nonzero().flatten()
    hard = (correct[-1] & ~correct[:-1].any(dim=0) & (exits == last)).nonzero().flatten()
    target_prob = logits[0].softmax(dim=1).gather(1, targets[:, None])[:, 0]
    easy = easy[confidence[first, easy].argsort(descending=True, stable=True)]
    return easy, hard[target_prob[hard].argsort(stable=True)]


def examples_figure(
    picture: Callable[[int], Tensor],
    targets: Tensor,
    kinds: tuple[Tensor, Tensor],
    class_names: Sequence[str],
) -> Figure:
    """Draw one row of images for each of the classes with the most pairs: easy ones left, hard ones right.

    Only as many rows and columns are drawn as there are images for; a kind without any image is left out.

    Args:
        picture: Image of an index, bytes (3, H, W).
        targets: (N,).
        kinds: Indices of easy and of hard images, from ``example_images``.
        class_names: Names of all classes.
    """
    counts = [torch.bincount(targets[kind], minlength=len(class_names)).clamp(max=COLUMNS) for kind in kinds]
    order = (torch.minimum(*counts) * (COLUMNS + 1) + torch.maximum(*counts)).argsort(
        descending=True, stable=True
    )
    classes = sorted(label for label in order[:ROWS].tolist() if counts[0][label] + counts[1][label] > 0)
    columns = [max((int(count[label]) for label in classes), default=0) for count in counts]
    step = 1 + GAP
    right_edge = columns[0] * step + (WIDE_GAP if columns[0] else 0.0)
    width, height = max(right_edge + columns[1] * step, 3.0), max(len(classes), 1) * step
    labels = ["\n".join(wrap(class_names[label], LABEL_LENGTH)) for label in classes]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    # In inches: an image is one inch wide.
    left, top, right = 0.2 + 0.08 * longest, 0.6, 0.1
    figure = Figure(figsize=(left + width + right, top + height), dpi=150)
    # One coordinate system: one per image would take longer to draw than an evaluation of small images takes.
    box = (left / (left + width + right), 0, width / (left + width + right), height / (top + height))
    axes = figure.add_axes(box)
    axes.set_axis_off()
    if not classes:
        axes.text(0.1, 0.5, "no easy and no hard images", va="center", fontsize=8, color="gray")
    for row, label in enumerate(labels):
        axes.text(-0.1, row * step + 0.5, label, ha="right", va="center", fontsize=8, parse_math=False)
    for kind, edge, count, title in zip(kinds, (0.0, right_edge), columns, TITLES, strict=True):
        if count:
            lines = "\n".join(wrap(title, max(int(14 * count * step), 12)))
            axes.text(edge + count * step / 2, -0.1, lines, ha="center", va="bottom", fontsize=9)
            for row, label in enumerate(classes):
                _draw_row(axes, picture, kind[targets[kind] == label][:COLUMNS].tolist(), edge, row * step)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    return figure


def _draw_row(
    axes: Axes, picture: Callable[[int], Tensor], indices: list[int], left: float, top: float
) -> None:
    if not indices:
        axes.text(left + 0.1, top + 0.5, "none", va="center", fontsize=8, color="gray")
    for column, index in enumerate(indices):
        edge = left + column * (1 + GAP)
        pixels = picture(index).permute(1, 2, 0).cpu().numpy()
        axes.imshow(pixels, interpolation="nearest", extent=(edge, edge + 1, top + 1, top))
