"""The words of policies: how confidence is measured, and the rules that find thresholds. This module imports nothing heavy."""

MEASURES = ("softmax", "entropy", "margin", "patience")
RULES = ("geometric", "optimised")
