"""Trains many models in one program: a grid of members, their waves and results."""
