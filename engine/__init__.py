"""Code that both training stages share: one loop, checkpoints, evaluation, logs, several processes."""
