"""Synthetic data sets of logical and structural defects."""
