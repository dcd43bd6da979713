"""Holds the methods of anomaly detection, which learn from normal images."""
