"""Measured time beside operations: the rows, the picture, and the order of measurement."""

import torch

from adaptive_inference.policies import policy_curve
from adaptive_inference.timing import draw_runtime, interleaved_seconds, runtime_rows
from models import count_operations
from tests.test_predictor import logits_of, make_network, quantile_policy


def test_rows_and_picture():
    network = make_network(2).float()
    images = torch.randn(24, 3, 32, 32)
    operations, lazy = count_operations(network, 32), count_operations(network, 32, lazy=True)
    logits = logits_of(network, images)
    rows = [
        {"p": p, "thresholds": list(quantile_policy(logits, share).thresholds), "val_acc": 50.0, "val_flops": float(p)}
        for p, share in enumerate((0.9, 0.5, 0.1), start=1)
    ]
    curve = policy_curve(network, operations, {"geometric": rows})
    measured = runtime_rows(network, curve, images, operations, lazy, batch_sizes=(1, 16), points=2, repeats=1, images_at_batch_1=4)
    assert [(row["batch_size"], row["p"]) for row in measured] == [(1, 1), (1, 3), (16, 1), (16, 3)]
    for row in measured:
        assert 0 < row["lazy_operations"] <= row["operations"] <= operations[-1]
        assert row["milliseconds"] > 0
        assert row["full_milliseconds"] > 0
    assert measured[2]["operations"] < measured[3]["operations"]
    assert len(draw_runtime(measured).axes[0].lines) == 2


def test_functions_take_turns():
    calls = []
    interleaved_seconds([lambda: calls.append("a"), lambda: calls.append("b")], 3, torch.device("cpu"))
    assert "".join(calls) == "aabb" + "aabb" * 3
