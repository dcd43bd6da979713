"""Trains and evaluates runs: their config, categories and results."""
