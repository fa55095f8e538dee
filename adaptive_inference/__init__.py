"""Less computation on easy images: thresholds, budgets, and prediction that stops early.

``budgeted`` finds thresholds and evaluates them, ``policy_files`` keeps them, and ``predictor`` stops early.
``fold`` makes a network fast for prediction, ``export`` writes it for ONNX Runtime. What promises something
about accuracy or time is in ``adaptive_inference.promises``.
"""

from .budgeted import ExitPredictions, evaluate_thresholds, geometric_thresholds
from .choosing import allowed_points, choose
from .confidence import confidence_by_exit
from .fold import fold
from .loading import load_predictor
from .policy_files import policy_curve, read_policy, write_policy
from .predictor import AdaptivePredictor, simulate

__all__ = [
    "AdaptivePredictor",
    "ExitPredictions",
    "allowed_points",
    "choose",
    "confidence_by_exit",
    "evaluate_thresholds",
    "fold",
    "geometric_thresholds",
    "load_predictor",
    "policy_curve",
    "read_policy",
    "simulate",
    "write_policy",
]
