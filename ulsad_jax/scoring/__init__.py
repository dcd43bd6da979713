"""Turns maps into calibrated maps, thresholds, scores and decisions."""
