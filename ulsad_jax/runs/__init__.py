"""Runs: their config, training, evaluation and results."""
