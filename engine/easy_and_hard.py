"""Easy and hard images, as in the MSDNet paper's figure 5: those that left first and right, and those only the last exit got right.

easy, hard = easy_and_hard(logits, targets, policy)
figure = examples_figure(lambda i: images[i], targets, easy, hard, class_names)
"""

from collections.abc import Callable
from textwrap import wrap

import torch
from matplotlib.figure import Figure
from torch import Tensor

from adaptive_inference.budgeted import assign_exits
from adaptive_inference.confidence import confidence_by_exit
from adaptive_inference.policies import Policy

ROWS, COLUMNS = 4, 5  # classes, and images of each kind
GAP, WIDE_GAP = 0.08, 0.4  # between images, and between the two kinds, in image widths


def easy_and_hard(logits: Tensor, targets: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """Indices of the easy images, the most confident first, and of the hard ones, the least sure first exit first.

    Easy: left at the first exit at which any image of the set leaves, with the right class. Hard: reached the
        last exit, which is right,
    while every other exit is wrong.

    Args:
        logits: of every exit, (K, N, C).
        targets: (N,).
    """
    confidence, classes = confidence_by_exit(logits, policy.measure)
    correct = classes == targets
    exits = assign_exits(confidence, torch.tensor(policy.thresholds))
    first, last = exits.min(), len(logits) - 1
    easy = ((exits == first) & correct[first]).nonzero().flatten()
    hard = (correct[-1] & ~correct[:-1].any(dim=0) & (exits == last)).nonzero().flatten()
    target_prob = logits[0].softmax(dim=1).gather(1, targets[:, None])[:, 0]
    return easy[confidence[first, easy].argsort(descending=True, stable=True)], hard[
        target_prob[hard].argsort(stable=True)
    ]


def examples_figure(
    picture: Callable[[int], Tensor],
    targets: Tensor,
    easy: Tensor,
    hard: Tensor,
    class_names: list[str],
) -> Figure:
    """A row of images for each of the classes with the most pairs of easy and hard images: left the easy ones, right the hard ones; where
    a class has none of a kind, that is written there.

    Args:
        picture: image of an index, bytes (3, H, W).
        targets: (N,).
        easy, hard: indices, as ``easy_and_hard`` gives.
    """
    counts = [
        torch.bincount(targets[kind], minlength=len(class_names)).clamp(max=COLUMNS) for kind in (easy, hard)
    ]
    order = (torch.minimum(*counts) * (COLUMNS + 1) + torch.maximum(*counts)).argsort(
        descending=True, stable=True
    )
    classes = sorted(order[:ROWS].tolist())
    step, right_half = 1 + GAP, COLUMNS * (1 + GAP) + WIDE_GAP
    width, height = right_half + COLUMNS * step, len(classes) * step
    labels = ["\n".join(wrap(class_names[label], 18)) for label in classes]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    figure = Figure(
        figsize=(width + 0.3 + 0.08 * longest, height + 0.4), dpi=150, layout="constrained"
    )  # inches
    # A single coordinate system: one an image would take longer to draw than an evaluation of small images takes.
    axes = figure.add_subplot()
    axes.set_axis_off()
    for row, label in enumerate(classes):
        top = row * step
        axes.text(-0.1, top + 0.5, labels[row], ha="right", va="center", fontsize=8, parse_math=False)
        for left_edge, kind in ((0.0, easy), (right_half, hard)):
            own = kind[targets[kind] == label][:COLUMNS].tolist()
            if not own:
                axes.text(left_edge + 0.1, top + 0.5, "none", va="center", fontsize=8, color="gray")
            for column, index in enumerate(own):
                left = left_edge + column * step
                pixels = picture(index).permute(1, 2, 0).cpu().numpy()
                axes.imshow(pixels, interpolation="nearest", extent=(left, left + 1, top + 1, top))
    for left_edge, title in (
        (0.0, "left at the first exit, right"),
        (right_half, "only the last exit is right"),
    ):
        axes.text(left_edge + COLUMNS * step / 2, -0.1, title, ha="center", va="bottom", fontsize=9)
    axes.set(xlim=(-0.1, width), ylim=(height, -0.1), aspect="equal")
    return figure
