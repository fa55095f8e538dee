"""Easy and hard images are what their names say, and the picture shows them."""

import torch

from adaptive_inference.examples import easy_and_hard, examples_figure
from adaptive_inference.policies import Policy

POLICY = Policy((0.8, 0.8, -1e8))


def probs_from(answers):
    """(class, logit) of every exit for every image -> probabilities (K, N, 3)."""
    logits = torch.zeros(3, len(answers), 3)
    for i, exits in enumerate(answers):
        for k, (label, size) in enumerate(exits):
            logits[k, i, label] = size
    return logits.softmax(dim=2)


ANSWERS = [
    [(0, 5.0), (0, 5.0), (0, 5.0)],  # easy
    [(0, 9.0), (0, 5.0), (0, 5.0)],  # easier
    [(1, 9.0), (0, 5.0), (0, 5.0)],  # left first, and wrong
    [(1, 1.0), (2, 1.0), (0, 1.0)],  # hard
    [(1, 1.5), (2, 1.0), (0, 1.0)],  # harder
    [(1, 1.0), (0, 1.0), (0, 1.0)],  # the second exit has it right too
    [(1, 1.0), (2, 9.0), (0, 5.0)],  # left at the second exit
]


def test_easy_and_hard():
    easy, hard = easy_and_hard(probs_from(ANSWERS).log(), torch.zeros(7, dtype=torch.int64), POLICY)
    assert easy.tolist() == [1, 0]
    assert hard.tolist() == [4, 3]


def test_figure():
    images = torch.randint(256, (7, 3, 8, 8), dtype=torch.uint8)
    targets = torch.zeros(7, dtype=torch.int64)
    easy, hard = easy_and_hard(probs_from(ANSWERS).log(), targets, POLICY)
    figure = examples_figure(lambda i: images[i], targets, easy, hard, ["a", "b", "c"], columns=3)
    (axes,) = figure.axes
    lefts = sorted(image.get_extent()[0] for image in axes.images)
    assert len(lefts) == 4
    assert lefts[1] < 3 < lefts[2]  # two of each kind, the hard ones on the right
    assert [text.get_text() for text in axes.texts][:7] == ["a", "b", "none", "none", "c", "none", "none"]
    long = examples_figure(lambda i: images[i], targets, easy, hard, ["cost in $ or " + 5 * "very long ", "b$", "c$"], columns=3)
    long.canvas.draw()
    name = long.axes[0].texts[0].get_window_extent()
    assert name.x0 >= 0
    assert name.height < 1.2 * 150  # of a row of pictures, about
    one_class = examples_figure(lambda i: images[i], targets, easy, hard, ["a", "b", "c"], classes=[0], columns=1)
    assert len(one_class.axes[0].images) == 2
