"""Measured time: blocks add up to policies."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from adaptive_inference.block_times import BlockTimes
from adaptive_inference.promises.deadlines import deadline_rows
from adaptive_inference.timing import distinct, measure_blocks, runtime_rows
from tests.conftest import policy_point
from tests.helpers import logits_of, make_network, quantile_policy


def blocks(batch_size):
    """Return times of two blocks: 1 ms for one image, then proportional; 0.5 ms after the last block."""
    sizes, times = np.array([1, 4]), np.array([1.0, 4.0])
    return BlockTimes(batch_size, (sizes, sizes), (times, times), (2 * times, 2 * times), (0.5, 0.7))


def test_time_of_a_policy_by_hand():
    assert blocks(1).milliseconds((1.0, 0.0)) == pytest.approx(1.5)
    assert blocks(1).milliseconds((0.75, 0.25)) == pytest.approx(1.5 + 0.25)
    # Proportional to the images that are left: their mean is all that counts.
    assert blocks(8).milliseconds((0.75, 0.25)) == pytest.approx((0.5 + 8 + 2) / 8)


def test_reserves():
    assert blocks(4).reserve(0, 1) == pytest.approx(2.7)
    assert blocks(4).reserve(1, 2) == pytest.approx(8.7)  # as for the next larger size that was measured
    assert blocks(4).reserve(1, 8) == pytest.approx(16.7)


def test_blocks_are_measured_at_the_sizes_that_occur():
    network, image = make_network(2).float(), torch.randn(1, 3, 32, 32)
    for batch_size in (1, 16):
        times = measure_blocks(network, image, batch_size, seconds=0.3)
        assert times.batch_size == batch_size
        for sizes, usual, high in zip(times.sizes, times.usual, times.high, strict=True):
            assert (np.diff(sizes) > 0).all()
            assert 1 <= sizes[0] <= sizes[-1] <= batch_size
            assert (usual > 0).all()
            assert (high > 0).all()


def test_rows():
    network = make_network(2).float()
    images = torch.randn(24, 3, 32, 32)
    logits = logits_of(network, images)
    shares = enumerate((0.9, 0.9, 0.5, 0.1), start=1)
    rows = [
        policy_point(
            p, list(quantile_policy(logits, share).thresholds), 50.0, float(p), [share, 0.0, 1 - share]
        )
        for p, share in shares
    ]
    points = distinct(tuple(rows), 10)
    assert [point.number for point in points] == [2, 3, 4]
    assert [point.number for point in distinct(tuple(points), 2)] == [2, 4]
    times = measure_blocks(network, images[:1], 1, seconds=0.2)
    measured = runtime_rows(network, points, images, times, seconds=0.2)
    assert [(row["batch_size"], row["p"]) for row in measured] == [(1, 0), (1, 2), (1, 3), (1, 4)]
    for row in measured:
        assert row["images"] >= 8
        assert row["milliseconds"] > 0
        assert row["expected_milliseconds"] > 0
    deadlines = deadline_rows(network, images, times, [10.0, 20.0, 30.0], calls=5)
    for row in deadlines:
        assert sum(row[f"share_{k}"] for k in (1, 2, 3)) == pytest.approx(1, abs=1e-3)
        assert 10 <= row["acc1"] <= 30
    disturbed = replace(times, high=(times.high[0] + 1e3, *times.high[1:]))
    assert len(deadline_rows(network, images, disturbed, [10.0, 20.0, 30.0], calls=2)) == 1
