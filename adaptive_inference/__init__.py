"""What adaptive networks are for: less computation on easy images.

``budgeted`` and ``optimised`` find thresholds and evaluate them over a set of images, ``policies`` keeps them and chooses, ``risk`` bounds
what they lose, ``ensemble`` makes better answers of the same exits. ``predictor`` stops early, on networks in their
``inference_form`` or on ONNX Runtime (``export``); ``timing`` measures time, ``examples`` draws images.

Names are imported when they are first used, so that ``adaptive_inference.measures`` alone does not load PyTorch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "AdaptivePredictor": "predictor",
    "AnytimePredictor": "promises.deadlines",
    "BudgetPredictor": "promises.deadlines",
    "ExitAnswers": "budgeted",
    "MaxLoss": "promises.risk",
    "allowed_points": "policies",
    "choose": "policies",
    "confidence_by_exit": "policies",
    "curve_rows": "budgeted",
    "geometric_thresholds": "budgeted",
    "inference_form": "fold",
    "load_predictor": "fold",
    "measure_blocks": "promises.timing",
    "optimised_thresholds": "promises.optimised",
    "policy_curve": "policies",
    "read_policy": "policies",
    "simulate": "predictor",
    "write_policy": "policies",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
