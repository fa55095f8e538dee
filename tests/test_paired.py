"""The difference between two networks on the same images, and its error."""

import math
from dataclasses import replace

import pytest
import torch

from engine.checkpoint import load_saved
from experiments import paired
from utils import UserError


def test_difference_by_hand():
    """Two of eight images are right by the second network alone, one by the first alone."""
    first = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
    second = torch.tensor([1, 1, 0, 1, 1, 0, 0, 0], dtype=torch.bool)
    difference, error = paired.paired_difference(first, second)
    assert difference == pytest.approx(12.5)
    variance = (3 - 8 * 0.125**2) / 7  # of +1, +1, -1 and five zeros
    assert error == pytest.approx(100 * math.sqrt(variance / 8))


def test_two_runs(finished, tiny_demo, capsys):
    runs = [str(finished / stage) for stage in ("GE", "IMTA")]
    assert paired.main([runs[0], runs[0]]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[0].isdecimal()]
    assert [row[3:] for row in rows[1:]] == [["+0.00", "0.00"]] * 3
    assert paired.main(runs) == 0
    (title, *rows) = capsys.readouterr().out.splitlines()
    assert title.endswith(" test images")
    for row in (row.split() for row in rows if row.split()[0].isdecimal()):
        assert float(row[2]) - float(row[1]) == pytest.approx(float(row[3]), abs=0.011)


@pytest.mark.parametrize(
    "changes", [{"image_size": 48}, {"fingerprint": "other"}, {"class_names": ["a", "b"]}]
)
def test_networks_of_other_data_are_not_compared(finished, tiny_demo, changes):
    own = load_saved(finished / "GE")
    data = replace(own.data, **changes)
    other = replace(own, description=replace(own.description, data=data))
    with pytest.raises(UserError, match="the networks differ in their data set"):
        paired.correct_by_exit(own, other, None)


def test_networks_with_other_test_images_are_not_compared(finished, tiny_demo, capsys):
    """As after ``--test-size`` with another ``--split-seed``."""
    own = load_saved(finished / "GE")
    other = replace(own, split=own.split._replace(test_digests=torch.tensor([1, 2])))
    with pytest.raises(UserError, match="the networks differ in their data set"):
        paired.correct_by_exit(own, other, None)
    assert paired.main([str(finished / "GE"), "imta_cifar100"]) == 2
    assert capsys.readouterr().err.startswith("experiments.paired: the networks differ")
