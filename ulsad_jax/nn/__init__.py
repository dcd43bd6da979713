"""Layers of networks, and their computation on each backend."""
