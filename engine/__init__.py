"""Code that both training stages share: one loop, checkpoints, evaluation, logs, several processes.

Reading order:

- a run: ``run`` (from the command line to the tables), ``stage`` (what the two programs define), ``session``,
  ``run_directory``, ``run_data``, ``networks``, ``resuming``, ``checkpoint``, ``auto``;
- its training: ``trainer`` (the loop), ``stepper`` (one step), ``averaging``, ``interruption``;
- its evaluation: ``evaluate``, ``collect``, ``report``, ``example_images``;
- ``convert``: older files.

``runtime`` holds processes, devices and the log of a run, ``prediction`` the work of ``predict.py``.
"""
