"""Provides frozen networks and the features that they compute."""
