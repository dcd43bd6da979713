"""Layers of networks: what they compute, and how fast on which backend."""
