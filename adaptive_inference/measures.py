"""Names of the measures of confidence and of the rules that find thresholds. This module imports nothing."""

MEASURES = ("softmax", "entropy", "margin", "patience")
# "geometric": the paper's shares. "optimised": thresholds of the highest held-out accuracy. "ensemble": optimised for
# predictions from all exits so far. "certified": for promises about accuracy; its thresholds and its held-out results
# come from different images.
RULES = ("geometric", "optimised", "certified", "ensemble")
