"""The words of policies: how confidence is measured, and the rules that find thresholds. This module imports nothing heavy."""

MEASURES = ("softmax", "entropy", "margin", "patience")
# The rule "tested" is for promises about accuracy: its thresholds and its held-out results come from different images (``risk``). With
# "ensemble", thresholds are optimised for the answers of all exits so far (``ensemble``).
RULES = ("geometric", "optimised", "tested", "ensemble")
