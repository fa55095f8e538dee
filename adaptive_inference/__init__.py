"""Less computation on easy images: thresholds and budgets (``budgeted``, ``policies``), and prediction that stops early (``predictor``).

``fold`` makes a network fast for prediction, ``export`` writes it for ONNX Runtime. What promises something about accuracy or
time is in ``adaptive_inference.promises``.
"""

from .budgeted import ExitAnswers, curve_rows, geometric_thresholds
from .fold import fold, load_predictor
from .policies import allowed_points, choose, confidence_by_exit, policy_curve, read_policy, write_policy
from .predictor import AdaptivePredictor, simulate

__all__ = [
    "AdaptivePredictor",
    "ExitAnswers",
    "allowed_points",
    "choose",
    "confidence_by_exit",
    "curve_rows",
    "fold",
    "geometric_thresholds",
    "load_predictor",
    "policy_curve",
    "read_policy",
    "simulate",
    "write_policy",
]
