"""Code that both training stages share: one loop, checkpoints, evaluation, logs, several processes.

Reading order:

- a run: ``run`` (from the command line to the tables), ``stage`` (what the two programs define), ``record``
  (its directory and session), ``images``, ``networks``, ``resuming``, ``checkpoint``;
- its training: ``trainer`` (the loop), ``stepper`` (one step), ``averaging``, ``interruption``, ``signals``;
- its evaluation: ``evaluate``, ``collect``, ``report``, ``easy_and_hard``;
- the machine: ``launch`` and ``distributed`` (processes), ``device``, ``precision``, ``compiling``,
  ``auto``, ``failures`` (how a run ends), ``log``;
- ``predict.py``: ``prediction``, ``predictor_choice``, ``rows``; older files: ``convert``.
"""
