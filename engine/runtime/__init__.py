"""Processes, devices, number formats, compilation, signals, exit statuses and the log of a run."""
