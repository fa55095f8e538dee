"""What adaptive networks are for: less computation on easy images.

``budgeted`` and ``optimised`` find thresholds and evaluate them over a set of images, ``policies`` keeps them, ``predictor`` stops early
with them, on networks in their ``inference_form`` or on ONNX Runtime (``export``); ``runtime`` measures time, ``examples`` draws images.
"""

from adaptive_inference.budgeted import (
    assign_exits,
    budgeted_curve,
    budgeted_result,
    confidence_and_correctness,
    exit_shares,
    geometric_thresholds,
)
from adaptive_inference.inference_form import half_precision, inference_form
from adaptive_inference.optimised import optimised_curve, optimised_rows, optimised_thresholds
from adaptive_inference.policies import Policy, PolicyCurve, confidence_and_answers, policy_curve, read_policy, write_policy
from adaptive_inference.predictor import AdaptivePredictor, Prediction, simulate

__all__ = [
    "AdaptivePredictor",
    "Policy",
    "PolicyCurve",
    "Prediction",
    "assign_exits",
    "budgeted_curve",
    "budgeted_result",
    "confidence_and_answers",
    "confidence_and_correctness",
    "exit_shares",
    "geometric_thresholds",
    "half_precision",
    "inference_form",
    "optimised_curve",
    "optimised_rows",
    "optimised_thresholds",
    "policy_curve",
    "read_policy",
    "simulate",
    "write_policy",
]
