"""Frozen networks that features come from, and those features."""
