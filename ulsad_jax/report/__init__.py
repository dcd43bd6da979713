"""Draws the pictures and writes the report and tables of a run."""
