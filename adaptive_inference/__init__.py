"""Less computation on easy images: thresholds, budgets, and prediction that stops early.

Reading order, from the logits of held-out images to a prediction:

1. ``confidence``: logits (K, N, C) -> confidence and class (K, N);
2. ``budgeted``: confidence -> thresholds (K,) by the paper's rule, and their results; ``optimised``:
   thresholds of the highest accuracy; ``calibration``: temperatures, and ensembles of exits;
3. ``policies``: ``Policy``, ``Point`` (a policy with its results), ``PolicyCurve`` (all points of a network);
   ``finding``: logits -> curve, by steps 1 and 2;
4. ``policy_files``: curve -> ``policy.json`` and back; ``fingerprint``: which network a file belongs to;
5. ``points``: curve and budget -> the point to use;
6. ``predictor``: network and policy -> predictions that stop early; ``fold``: networks fast for prediction;
   ``loading``: steps 4 to 6 by the name of a network.

Beside this path: ``timing`` and ``block_times`` measure milliseconds, ``export`` writes ONNX, and
``promises`` holds what promises something: ``risk`` (accuracy), ``deadlines`` (time), ``drift`` (an alarm).
"""

from .budgeted import ExitPredictions, evaluate_thresholds, geometric_thresholds
from .confidence import confidence_by_exit
from .finding import find_policies, fit_full_policy, policy_curve
from .fold import fold
from .loading import load_predictor
from .points import choose, eligible_points
from .policy_files import read_policy, write_policy
from .predictor import AdaptivePredictor, simulate

__all__ = [
    "AdaptivePredictor",
    "ExitPredictions",
    "choose",
    "confidence_by_exit",
    "eligible_points",
    "evaluate_thresholds",
    "find_policies",
    "fit_full_policy",
    "fold",
    "geometric_thresholds",
    "load_predictor",
    "policy_curve",
    "read_policy",
    "simulate",
    "write_policy",
]
