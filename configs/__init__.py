"""Configurations: `--config=configs/<file>.py[:category]`."""
