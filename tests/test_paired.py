"""The difference between two networks on the same images, and its error."""

import math

import pytest
import torch

from experiments import paired


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
    ("changes", "message"),
    [
        ({"targets": torch.tensor([0, 1, 1])}, "different test images"),
        ({"class_names": ["car", "cat"]}, "different test images"),
        ({"correct": torch.ones(3, 3, dtype=torch.bool)}, "different numbers of exits"),
    ],
)
def test_networks_that_cannot_be_compared(monkeypatch, capsys, changes, message):
    own = paired.Predicted(torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 1, 0]), ["cat", "dog"])
    networks = {"one": own, "other": own._replace(**changes)}
    monkeypatch.setattr(paired, "correct_by_exit", lambda name, _: networks[name])
    assert paired.main(["one", "one"]) == 0
    assert paired.main(["one", "other"]) == 2
    assert f"experiments.paired: the networks have {message}" in capsys.readouterr().err
