"""What adaptive networks are for: less computation on easy images. ``budgeted`` evaluates it over a set of images."""

from adaptive_inference.budgeted import (
    assign_exits,
    budgeted_curve,
    budgeted_result,
    confidence_and_correctness,
    exit_shares,
    geometric_thresholds,
)

__all__ = [
    "assign_exits",
    "budgeted_curve",
    "budgeted_result",
    "confidence_and_correctness",
    "exit_shares",
    "geometric_thresholds",
]
